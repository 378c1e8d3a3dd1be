"""The grammar of an answer: exactly n integers in 0…num_bins, single spaces between, then the end of the turn.

A finite automaton over characters, lifted to tokens: a token may hold several characters ("52", " 524", "1 2"), and
every way to spell a valid answer stays open. Greedy decoding under the grammar therefore equals greedy decoding
without it whenever that answer is valid. State lives on the device, one row per sequence; a step is a few gathers.
"""

import re

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, ProcessorMixin

from vla0_trl.config import VLAConfig
from vla0_trl.processing.chat_tokenizer import ChatTokenizer

# Vocabulary entries that can spell digits and spaces: GPT-2's and sentencepiece's space, and byte-fallback tokens.
_NUMERIC = re.compile(r"(?:[0-9 Ġ▁]|<0x(?:20|3[0-9])>)+")

# The count of finished numbers until the prefix is written. Used as an index, it is a table's last row.
BEFORE_PREFIX = -1


class LogitsError(ValueError):
    """The model's logits are NaN, so they choose no token."""

    def __init__(self):
        super().__init__(
            "the model's logits are not numbers (NaN), so there is no answer: its numbers overflow, as they do in "
            "float16 (use bfloat16 or float32), or its training diverged (take an earlier checkpoint)"
        )


class ActionGrammar:
    """Transition tables, shared by all sequences.

    A sequence is described by the count of its finished numbers and a state: the number written so far (0 to
    `num_bins`), `open` (a first digit must follow), `start` (only the prefix may follow), `done` or `dead` (not
    valid). The tables' columns: the numeric tokens, the end of turn, and one for any other token.

    Example: " 7 12 0" is an answer of three numbers with `num_bins=12` and the prefix " ", one token per character:

        written     count            state    may follow
        (nothing)   BEFORE_PREFIX    start    " "
        " "         0                open     0 to 9
        " 7"        0                7        " "
        " 7 "       1                open     0 to 9
        " 7 1"      1                1        0, 1, 2, " "
        " 7 12"     1                12       " "
        " 7 12 "    2                open     0 to 9
        " 7 12 0"   2                0        end of turn
        (all)       2                done     padding

    After 7 and 12 no digit may follow, since 70 and 120 exceed 12, and no digit ever follows a leading 0. Each space
    adds one to the count. Only the third number is followed by the end of turn.

    Args:
        chat ([`ChatTokenizer`]): gives tokenizer, prefix and end of turn.
        num_values (`int`): integers in an answer.
        num_bins (`int`): the largest integer.
    """

    def __init__(self, chat: ChatTokenizer, num_values: int, num_bins: int):
        self.num_values, self.num_bins, self.prefix = num_values, num_bins, chat.prefix
        self.open, self.start, self.done, self.dead = range(num_bins + 1, num_bins + 5)
        self.end_of_turn_id = chat.end_of_turn_id
        tokens = _numeric_tokens(chat.tokenizer)
        self.token_ids = np.array([*tokens, chat.end_of_turn_id])
        end, other = len(tokens), len(tokens) + 1

        characters = self._character_transitions()
        self.next_state = np.full((num_bins + 5, other + 1), self.dead)
        for column, text in enumerate(tokens.values()):
            state = np.arange(num_bins + 5)
            for character in text:
                state = characters[state, 10 if character == " " else int(character)]
            self.next_state[:, column] = state
        self.next_state[: num_bins + 1, end] = self.done
        self.next_state[self.done, [end, other]] = self.done  # `generate` pads rows that have ended

        # A token with s spaces finishes s numbers; the end of turn is only allowed in the last one.
        spaces = [text.count(" ") for text in tokens.values()]
        self.finishes = np.array([*spaces, 0, 0])
        self.min_count = np.array([*(BEFORE_PREFIX for _ in spaces), num_values - 1])
        self.max_count = np.array([*(num_values - 1 - s for s in spaces), num_values - 1])
        self.initial_state = self.start if chat.prefix else self.open
        self.initial_count = BEFORE_PREFIX if chat.prefix else 0
        # With one token per character, this is the longest answer.
        self.max_new_tokens = num_values * (len(str(num_bins)) + 1) + 1
        self.live = self._live_states()
        self._classes = self._count_classes()
        self._choices: dict[tuple[int, int], list[int]] = {}
        if not self.live[self.initial_count, self.initial_state]:
            raise ValueError(
                f"this tokenizer can't spell {num_values} integers in 0…{num_bins}: digits or the space are missing"
            )

    def regular_expression(self) -> str:
        """The answers, without the end of the turn, for servers that decode under one: vLLM, SGLang, TGI, …

        Plain syntax (classes, groups, alternatives, {n}), to be matched from the first character to the last.
        """
        number = "(" + "|".join("".join(map(_spelled, digits)) for digits in _digit_ranges(self.num_bins)) + ")"
        return self.prefix + number + f"( {number}){{{self.num_values - 1}}}" * (self.num_values > 1)

    def gbnf(self) -> str:
        """The answers, without the end of the turn, in GBNF, for llama.cpp and others that read its grammars."""
        spelled = ([_spelled(digit, '"') for digit in digits] for digits in _digit_ranges(self.num_bins))
        numbers = " | ".join(map(" ".join, spelled))
        prefix = '" " ' if self.prefix else ""
        more = f' (" " number){{{self.num_values - 1}}}' if self.num_values > 1 else ""
        return f"root ::= {prefix}number{more}\nnumber ::= {numbers}\n"

    def choices(self, count: int, state: int) -> list[int]:
        """The columns that may follow, lowest token id first; for a loop that decodes on the host.

        `count` is of the numbers finished so far, or `BEFORE_PREFIX`; for `state` see the class.
        """
        key = (self._classes[count], state)
        if key not in self._choices:
            allowed = (self.min_count <= count) & (count <= self.max_count)
            reached = np.minimum(count + self.finishes[:-1], self.num_values - 1)
            columns = np.flatnonzero(allowed & self.live[reached, self.next_state[state, :-1]])
            self._choices[key] = columns[np.argsort(self.token_ids[columns])].tolist()
        return self._choices[key]

    def _count_classes(self) -> list[int]:
        """Counts with equal choices in every state share a class, so that few lists of choices are made.

        All counts far from an answer's end share one. The last entry is that of `BEFORE_PREFIX`.
        """
        reach = self.finishes.max() + 1
        classes: dict[bytes, int] = {}
        found = []
        for count in [*range(self.num_values), BEFORE_PREFIX]:
            after = self.live[np.minimum(count + np.arange(reach), self.num_values - 1)]
            signature = ((self.min_count <= count) & (count <= self.max_count)).tobytes() + after.tobytes()
            found.append(classes.setdefault(signature, len(classes)))
        return found

    def _character_transitions(self) -> np.ndarray:
        """(states, 11): ten digits and the space."""
        table = np.full((self.num_bins + 5, 11), self.dead)
        values = np.arange(1, self.num_bins + 1)  # no digit after a leading zero
        for digit in range(10):
            longer = values * 10 + digit
            table[values, digit] = np.where(longer <= self.num_bins, longer, self.dead)
            if digit <= self.num_bins:
                table[self.open, digit] = digit
        table[: self.num_bins + 1, 10] = self.open
        table[self.start, 10] = self.open
        return table

    def _live_states(self) -> np.ndarray:
        """(num_values + 1, states) bool: whether an answer can be finished from there with the existing tokens.

        The last row is that of `BEFORE_PREFIX`. With one token for each character all states are live; a vocabulary
        that lacks one, such as the single space, has dead ends, which must not be entered.
        """
        live = np.zeros((self.num_values + 1, self.num_bins + 5), bool)
        live[:, self.done] = True
        columns, reach = np.arange(len(self.token_ids)), self.finishes.max() + 1
        for count in [*reversed(range(self.num_values)), BEFORE_PREFIX]:
            above = live[count + 1 : count + 1 + reach]
            if 0 <= count < self.num_values - 2 * reach and (above == above[0]).all():
                live[count] = above[0]  # the end is too far for one token to reach, so nothing differs
                continue
            allowed = columns[(self.min_count <= count) & (count <= self.max_count)]
            targets = self.next_state[:, allowed]
            while True:  # ends after as many rounds as a number has digits
                reachable = live[count + self.finishes[allowed], targets].any(1) | live[count]
                if (reachable == live[count]).all():
                    break
                live[count] = reachable
        return live


class ActionGrammarLogitsProcessor(LogitsProcessor):
    """Forbids, for `generate()`, every token that would leave the grammar.

    A new one (or `reset()`) for each call of `generate()`. Not for beam search, which reorders rows.

    Args:
        processor (`ProcessorMixin`): the model's.
        config ([`VLAConfig`]): chunk, action width and bins.
        grammar ([`ActionGrammar`], *optional*): tables built before, which is cheaper than building them each time.
    """

    def __init__(
        self,
        processor: ProcessorMixin | None = None,
        config: VLAConfig | None = None,
        *,
        grammar: ActionGrammar | None = None,
    ):
        if grammar is None:
            grammar = ActionGrammar(ChatTokenizer(processor, config), config.num_values, config.num_bins)
        self.grammar = grammar
        self._tables: dict[str, torch.Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the sequences: the next call sees prompts."""
        self._length: int | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids` (B, L), `scores` (B, vocabulary) -> scores with −inf outside the grammar; or `LogitsError`."""
        tables = self._on_device(scores)
        if self._length is None or input_ids.shape[1] != self._length + 1:
            rows = (len(input_ids),)
            self._state = torch.full(rows, self.grammar.initial_state, device=scores.device)
            self._count = torch.full(rows, self.grammar.initial_count, device=scores.device)
        else:
            column = tables["column"][input_ids[:, -1]]
            self._count = self._count + tables["finishes"][column]
            self._state = tables["next_state"][self._state, column]
        self._length = input_ids.shape[1]

        count, targets = self._count[:, None], tables["next_state"][self._state, :-1]
        allowed = (tables["min_count"] <= count) & (count <= tables["max_count"])
        reached = (count + tables["finishes"][:-1]).clamp(max=self.grammar.num_values - 1)
        allowed &= tables["live"][reached, targets]
        # Clamped: a forbidden token must lose against an allowed one of score −inf, too.
        numeric = scores[:, tables["token_ids"]].clamp(min=torch.finfo(scores.dtype).min)
        if numeric.isnan().any():
            raise LogitsError
        forbidden = torch.full_like(scores, -torch.inf)
        forbidden[:, tables["token_ids"]] = numeric.masked_fill(~allowed, -torch.inf)
        return forbidden

    def _on_device(self, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._tables is None or self._tables["column"].device != scores.device:
            names = ("next_state", "finishes", "min_count", "max_count", "token_ids", "live")
            self._tables = {name: torch.as_tensor(getattr(self.grammar, name), device=scores.device) for name in names}
            # A model's vocabulary may be padded beyond its tokenizer's: size by the scores.
            column = torch.full((scores.shape[1],), len(self.grammar.token_ids), device=scores.device)
            column[self._tables["token_ids"]] = torch.arange(len(self.grammar.token_ids), device=scores.device)
            self._tables["column"] = column
        return self._tables


def _digit_ranges(largest: int) -> list[list[tuple[int, int]]]:
    """0…largest without leading zeros, as alternatives of digits, each from a first to a last one.

    Example: 511 is 0-9, 1-9 0-9, 1-4 0-9 0-9, 5 0-0 0-9, 5 1 0-1.
    """
    any_digit, digits = (0, 9), [int(digit) for digit in str(largest)]
    shorter = [[(1, 9), *[any_digit] * (width - 1)] for width in range(2, len(digits))]
    alternatives = [[any_digit], *shorter] if len(digits) > 1 else []
    for place, digit in enumerate(digits):
        low = int(place == 0 and len(digits) > 1)
        last = place == len(digits) - 1
        high = digit if last else digit - 1
        if low <= high:
            same = [(d, d) for d in digits[:place]]
            alternatives.append([*same, (low, high), *[any_digit] * (len(digits) - place - 1)])
    return alternatives


def _spelled(digits: tuple[int, int], quote: str = "") -> str:
    low, high = digits
    return f"{quote}{low}{quote}" if low == high else f"[{low}-{high}]"


def _numeric_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> text of every token made of digits and spaces alone."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    candidates = [i for i, name in enumerate(names) if name and i not in special and _NUMERIC.fullmatch(name)]
    # Decoded behind a digit: sentencepiece drops the space of a text's first token.
    anchor = tokenizer("0", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
    texts = {i: tokenizer.decode([*anchor, i], clean_up_tokenization_spaces=False)[start:] for i in candidates}
    return {i: text for i, text in texts.items() if re.fullmatch("[0-9 ]+", text) and "  " not in text}
