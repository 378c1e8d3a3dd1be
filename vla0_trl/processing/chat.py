"""What is said to the model, and what it answers: the only place where prompts are written.

Messages are TRL's prompt-completion form with plain strings, so that a chat dataset trains under plain TRL too;
`with_images` turns them into what a processor's chat template renders, as TRL does.
"""

import re
from collections.abc import Iterable

from vla0_trl.config import VLAConfig

Message = dict[str, str]
MAX_TASK = 2000  # characters of an instruction that a server reads, and whose prompt is kept in memory

# VLA-0's prompt (arXiv:2510.13054, section 3.2). VLA-0-Smol found no effect on a fine-tuned SmolVLM2: off by default.
SYSTEM_PROMPT = (
    "Analyze the input image and predict robot actions for {steps}. Each action has "
    "{action_dim} dimensions. Output a single sequence of {num_values} integers (0 - {num_bins} each), representing "
    "the {num_steps} timesteps sequentially. Provide only space-separated numbers. Nothing else."
)
# The state comes last and as "State:" + " 12" + " 400": every number has its space before it, as in an answer.
STATE_LINE = "\nState: "
# What the chat templates of vision-language models write between texts. A task with such a token would be read as
# another image, or as the end of the user's turn.
_SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?s>|<(bos|eos|pad|unk|image|video|audio|end_of_utterance|fake_token_around_image|global-img"
    r"|row_\d+_col_\d+|(start|end)_of_(turn|image)|image_soft_token)>|\[/?(INST|IMG|IMG_BREAK|IMG_END|SYSTEM_PROMPT)\]"
)


def task_mistake(task: str, special_tokens: Iterable[str] = ()) -> str | None:
    """Why a text can't be an instruction, in words; None if it can.

    Args:
        special_tokens (`Iterable[str]`): of the processor that will read it, beside those that are widely used.
    """
    if not task.strip():
        return "is empty: a policy needs an instruction"
    special = _SPECIAL.search(task)
    found = special.group() if special else next((token for token in special_tokens if token in task), None)
    if found is not None:
        return f"is {task[:60]!r}, and {found!r} is a special token, by which it would change the prompt"
    if STATE_LINE in task or any(ord(char) < 32 and char not in "\n\t" for char in task):
        return f"is {task[:60]!r}, and has control characters or a line that begins with {STATE_LINE.strip()!r}"
    return None


def prompt_messages(config: VLAConfig, task: str, state: str = "") -> list[Message]:
    """The user's turn, after VLA-0's system prompt if the config asks for it.

    Args:
        task (`str`): the instruction; must not be empty, see [`task_mistake`].
        state (`str`): the state as integers; ignored unless `config.use_state`.
    """
    if mistake := task_mistake(task):
        raise ValueError(f"the task {mistake}")
    messages = []
    if config.use_system_prompt:
        steps = f"the next {config.chunk_size} timesteps"
        if config.waypoints is not None:
            numbers = ", ".join(str(step + 1) for step in config.waypoints)
            steps = f"timesteps {numbers} of the next {config.chunk_size}"
        system = SYSTEM_PROMPT.format(
            steps=steps,
            num_steps=len(config.written_steps),
            action_dim=config.action_dim,
            num_values=config.num_values,
            num_bins=config.num_bins,
        )
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": task + (STATE_LINE + state if config.use_state else "")})
    return messages


def completion_messages(action: str) -> list[Message]:
    """The answer: the action text."""
    return [{"role": "assistant", "content": action}]


def with_images(messages: list[Message], num_images: int) -> list[dict]:
    """String contents -> content parts, the images before the first user text (as TRL places them)."""
    parts = []
    for message in messages:
        images = [{"type": "image"}] * num_images if message["role"] == "user" else []
        parts.append({"role": message["role"], "content": [*images, {"type": "text", "text": message["content"]}]})
    return parts
