"""Chat templates are programs that come with a checkpoint: they run in a process with limits, once."""

import json
import os
import re
import resource
import select
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from transformers import ProcessorMixin

from vla0_trl.config import VLAConfig
from vla0_trl.processing.chat import completion_messages, prompt_messages, with_images
from vla0_trl.schema import one_line

SECONDS, BYTES, CHARACTERS = 2, 1 << 30, 100_000  # a real one takes a millisecond and writes a few hundred characters
_START_SECONDS, _ATTEMPTS = 20, 3  # for a fork to begin

# Characters that no text uses: they show where a template writes task, state and answer.
_TASK, _STATE, _ANSWER = "\ue000", "\ue001", "\ue002"
_EXAMPLE = ("Push the T, please.", "12 400")
_FIRST_TEXT = 0xF0000  # and those after it: the first text of a conversation, the second, …


def chat_frame(processor: ProcessorMixin, config: VLAConfig, num_images: int) -> tuple[tuple[str, str, str], str, str]:
    """What the template writes before the task, between task and state, and after them; before and after an answer.

    The template runs here, in a process with limits, and never again: what it writes is cut where task, state and
    answer are, and the parts are put together for every other task.
    """

    def written(task: str, state: str, action: str | None = None) -> str:
        messages = prompt_messages(config, task, state)
        if action is not None:
            messages += completion_messages(action)
        return processor.apply_chat_template(with_images(messages, num_images), add_generation_prompt=action is None)

    prompt, full, example = within_limits(
        lambda: [written(_TASK, _STATE), written(_TASK, _STATE, _ANSWER), written(*_EXAMPLE)],
        processor.tokenizer.name_or_path or "nano",
    )
    if not full.startswith(prompt):
        raise ValueError(
            "the chat template writes a different prompt once the answer is there, so completion-only training has no "
            f"well-defined completion: {prompt!r} is not the beginning of {full!r}"
        )
    prefix, found, suffix = full[len(prompt) :].partition(_ANSWER)
    if not found or prefix not in ("", " ") or not suffix or _ANSWER in suffix:
        raise ValueError(
            f"the chat template puts {prefix!r} before and {suffix!r} after an answer; supported are nothing or a "
            "space before it, and an end of turn after it"
        )
    task, state = _EXAMPLE
    if prompt.replace(_TASK, task).replace(_STATE, state) != example or prompt.count(_TASK) != 1:
        raise ValueError(f"the chat template must write the task once, as it is: of {task!r} it makes {example!r}")
    before, rest = prompt.split(_TASK)
    between, _, after = rest.partition(f" {_STATE}")
    return (before, between, after), prefix, suffix


def chat_turns(processor: ProcessorMixin, messages: Sequence[dict], targets_from: int) -> tuple[list[str], bool]:
    """What the template writes before and as each answer from turn `targets_from` on, for [`fill`]; whether it trims.

    Like [`chat_frame`], for conversations of any roles and content parts: their texts don't matter.
    """
    places = list(map(chr, range(_FIRST_TEXT, _FIRST_TEXT + sum(len(message["content"]) for message in messages))))

    def written(texts: list[str]) -> list[str]:
        rest = iter(texts)
        chat = [
            {"role": m["role"], "content": [p | {"text": next(rest)} if "text" in p else p for p in m["content"]]}
            for m in messages
        ]
        turns, done = [], ""
        for index, message in enumerate(chat):
            if message["role"] == "assistant" and index >= targets_from:
                before = processor.apply_chat_template(chat[:index], add_generation_prompt=True)
                after = processor.apply_chat_template(chat[: index + 1])
                if not before.startswith(done) or not after.startswith(before):
                    raise ValueError(f"it changes what is before the answer of turn {index + 1}")
                turns += [before[len(done) :], after[len(before) :]]
                done = after
        return turns

    name = processor.tokenizer.name_or_path or "nano"
    examples = [f" {place} It's <b>.\n" for place in places]
    found = within_limits(lambda: written(places) + written(examples), name)
    turns, wanted = found[: len(found) // 2], found[len(found) // 2 :]
    for trims in (False, True):
        if [fill(turn, examples, trims) for turn in turns] == wanted:
            return turns, trims
    raise ValueError(
        f"{name}: its chat template must write texts as they are: of {examples[0]!r} it makes another one"
    )


def fill(turn: str, texts: Sequence[str], trims: bool) -> str:
    """One of [`chat_turns`], with a conversation's texts in their places."""
    texts = [text.strip() for text in texts] if trims else texts
    return re.sub("[\U000f0000-\U000fffff]", lambda place: texts[ord(place.group()) - _FIRST_TEXT], turn)


def within_limits(render: Callable[[], list[str]], name: str) -> list[str]:
    """What `render` returns, computed in a fork of this process that may take `SECONDS` and `BYTES` more.

    Transformers' sandbox keeps a template from files and from Python, not from looping forever. `ValueError` if it ran
    into a limit, or raised; `name` is the model's, for that message.
    """
    for _ in range(_ATTEMPTS):
        data, stuck = _forked(render)
        if not stuck:
            break
    if not data:
        raise ValueError(
            f"{name}: its chat template takes more than {SECONDS} s or {BYTES >> 30} GiB for one row: it is damaged "
            "or malicious, take the model from a place that you trust"
        )
    found = json.loads(data)
    if isinstance(found, str):
        raise ValueError(f"{name}: its chat template can't be used: {found}")
    return found


def _forked(render: Callable[[], list[str]]) -> tuple[bytes, bool]:
    """What a fork of this process answers, nothing if it ended before; whether it was stuck: no template's doing.

    A fork may wait forever for a lock that another thread held at that moment: in `render`, or even within Python's
    own `os.fork()`, where no alarm is set yet. So it says when it begins.
    """
    result, answer = os.pipe()
    child = os.fork()
    if not child:
        os.close(result)
        _answer(render, answer)
    os.close(answer)
    with open(result, "rb") as file:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        begun = poll.poll(_START_SECONDS * 1000)
        if not begun:
            os.kill(child, signal.SIGKILL)
        data = file.read()[1:]
    _, status = os.waitpid(child, 0)
    return (b"" if status else data), not begun or os.WTERMSIG(status) == signal.SIGALRM


def _answer(render: Callable[[], list[str]], pipe: int) -> None:
    """In the fork: write what `render` returns, or what it raises; never returns."""
    status = 1
    try:
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        signal.alarm(15 * SECONDS)  # on a busy machine, or if it is stuck
        os.write(pipe, b".")  # it has begun
        try:
            found: list[str] | str = render()
            if any(len(text) > CHARACTERS for text in found):
                found = f"it writes more than {CHARACTERS} characters for one row"
        except Exception as error:  # whatever a stranger's program raises
            found = f"{type(error).__name__}: {one_line(error)}"
        with suppress(OSError), open(pipe, "wb") as file:
            file.write(json.dumps(found).encode())
            status = 0
    finally:
        os._exit(status)
