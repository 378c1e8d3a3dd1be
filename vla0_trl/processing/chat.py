"""What is said to the model, and what it answers: the only place where prompts are written.

Messages are TRL's prompt-completion form with plain strings, so that a chat dataset trains under plain TRL too;
`with_images` turns them into what a processor's chat template renders, as TRL does.
"""

from __future__ import annotations

from vla0_trl.config import VLAConfig

Message = dict[str, str]

# VLA-0's prompt (arXiv:2510.13054, section 3.2). VLA-0-Smol found no effect on a fine-tuned SmolVLM2: off by default.
SYSTEM_PROMPT = (
    "Analyze the input image and predict robot actions for {steps}. Each action has "
    "{action_dim} dimensions. Output a single sequence of {num_values} integers (0 - {num_bins} each), representing "
    "the {num_steps} timesteps sequentially. Provide only space-separated numbers. Nothing else."
)
# The state comes last and as "State:" + " 12" + " 400": every number has its space before it, as in an answer.
STATE_LINE = "\nState: "


def prompt_messages(config: VLAConfig, task: str, state: str = "") -> list[Message]:
    """The user's turn, after VLA-0's system prompt if the config asks for it.

    Args:
        task (`str`): the instruction; must not be empty.
        state (`str`): the state as integers; ignored unless `config.use_state`.
    """
    if not task.strip():
        raise ValueError("the task is empty: a policy needs an instruction")
    messages = []
    if config.use_system_prompt:
        system = SYSTEM_PROMPT.format(
            steps=_steps(config),
            num_steps=len(config.written_steps),
            action_dim=config.action_dim,
            num_values=config.num_values,
            num_bins=config.num_bins,
        )
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": task + (STATE_LINE + state if config.use_state else "")})
    return messages


def _steps(config: VLAConfig) -> str:
    if config.waypoints is None:
        return f"the next {config.chunk_size} timesteps"
    return f"timesteps {', '.join(str(step + 1) for step in config.waypoints)} of the next {config.chunk_size}"


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
