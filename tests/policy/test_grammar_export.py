"""The grammar as regular expression and GBNF: other people's decoders accept exactly what ours does."""

import re
import tempfile
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from support.backbones import DIGITS, Chat, multi_digit_tokenizer, observations
from support.random_policies import build_policy

from vla0_trl import VLAPolicy
from vla0_trl.actions import ActionParseError
from vla0_trl.policy.grammar import ActionGrammar

SHAPES = [
    (1, 0, ""),
    (1, 9, " "),
    (2, 10, ""),
    (3, 100, " "),
    (6, 511, " "),
    (6, 255, ""),
    (5, 1000, " "),
    (4, 65535, ""),
]
SHAPES += [(3, 99, ""), (3, 909, " ")]
STRINGS = 1000  # of each
CHARACTERS = "0123456789 -+.a\n٣"  # of `strings`


def ours(num_values: int, num_bins: int, prefix: str) -> ActionGrammar:
    return ActionGrammar(Chat(multi_digit_tokenizer([*DIGITS, "Ġ"]), prefix), num_values, num_bins)


def accepts(grammar: ActionGrammar, text: str) -> bool:
    """Character by character, as decoding goes; the end of the turn must be possible at the end."""
    columns = {" " if token == "Ġ" else token: place for place, token in enumerate([*DIGITS, "Ġ"])}
    count, state = grammar.initial_count, grammar.initial_state
    for character in text:
        column = columns.get(character)
        if column is None or column not in grammar.choices(count, state):
            return False
        count, state = count + int(grammar.finishes[column]), int(grammar.next_state[state, column])
    return len(columns) in grammar.choices(count, state)


def strings(num_values: int, num_bins: int, prefix: str) -> list[str]:
    """Half of them right, the others with one thing wrong, most of them."""
    rng = np.random.default_rng(num_bins)
    found = []
    for number in range(STRINGS):
        values = [str(rng.choice([0, num_bins, rng.integers(num_bins + 1)])) for _ in range(num_values)]
        text = prefix + " ".join(values)
        if number % 2:
            place = int(rng.integers(len(text) + 1))
            broken = [
                text[:place] + str(rng.choice([*CHARACTERS])) + text[place:],
                text[:place] + text[place + 1 :],
                text + " ",
                text + " 0",
                prefix + " ".join([*values[:-1], str(num_bins + 1)]),
                prefix + " ".join(["0" + values[0], *values[1:]]),
                text.replace(" ", "  "),
                text.strip(),
                "",
            ]
            text = broken[int(rng.integers(len(broken)))]
        found.append(text)
    return found


def regex_of_python(grammar: ActionGrammar) -> Callable[[str], bool]:
    pattern = re.compile(grammar.regular_expression())
    return lambda text: pattern.fullmatch(text) is not None


def regex_of_xgrammar(grammar: ActionGrammar) -> Callable[[str], bool]:
    xgrammar = pytest.importorskip("xgrammar", reason="pip install xgrammar")
    from xgrammar.testing import _is_grammar_accept_string

    exported = xgrammar.Grammar.from_regex(grammar.regular_expression())
    return lambda text: _is_grammar_accept_string(exported, text)


def gbnf_of_xgrammar(grammar: ActionGrammar) -> Callable[[str], bool]:
    xgrammar = pytest.importorskip("xgrammar", reason="pip install xgrammar")
    from xgrammar.testing import _is_grammar_accept_string

    exported = xgrammar.Grammar.from_ebnf(grammar.gbnf())
    return lambda text: _is_grammar_accept_string(exported, text)


def llguidance_accepts(exported: str) -> Callable[[str], bool]:
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")

    def accepts(text: str) -> bool:
        matcher = llguidance.LLMatcher(tokenizer, exported)
        tokens = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return accepts


def regex_of_llguidance(grammar: ActionGrammar) -> Callable[[str], bool]:
    llguidance = pytest.importorskip("llguidance", reason="pip install llguidance")
    return llguidance_accepts(llguidance.LLMatcher.grammar_from_regex(grammar.regular_expression()))


def gbnf_of_llguidance(grammar: ActionGrammar) -> Callable[[str], bool]:
    llguidance = pytest.importorskip("llguidance", reason="pip install llguidance")
    from llguidance.gbnf_to_lark import any_to_lark

    return llguidance_accepts(llguidance.LLMatcher.grammar_from_lark(any_to_lark(grammar.gbnf())))


def gbnf_of_llama_cpp(grammar: ActionGrammar) -> Callable[[str], bool]:
    """llama.cpp's own sampler, which is asked before each character whether it is possible; no model is needed."""
    lib = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python gguf")
    vocabulary, size = lib.llama_model_get_vocab(characters_of_llama_cpp()), len(CHARACTERS) + 1
    sampler = lib.llama_sampler_init_grammar(vocabulary, grammar.gbnf().encode(), b"root")

    def possible() -> set[int]:
        tokens = (lib.llama_token_data * size)(*(lib.llama_token_data(token, 0.0, 0.0) for token in range(size)))
        lib.llama_sampler_apply(sampler, lib.llama_token_data_array(tokens, size, -1, False))
        return {token.id for token in tokens if np.isfinite(token.logit)}

    def accepts(text: str) -> bool:
        lib.llama_sampler_reset(sampler)
        for token in map(CHARACTERS.index, text):
            if token not in possible():
                return False
            lib.llama_sampler_accept(sampler, token)
        return len(CHARACTERS) in possible()  # the end of the turn

    return accepts


@cache
def characters_of_llama_cpp():
    """A model of llama.cpp without weights: a token for each of `CHARACTERS`, in GPT-2's spelling, and an end."""
    import llama_cpp

    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    spelled = {" ": "Ġ", "\n": "Ċ", "٣": "Ù£"}
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(path := f"{folder}/vocabulary.gguf", "llama")
        for count in ("block_count", "context_length", "embedding_length", "head_count", "feed_forward_length"):
            getattr(writer, f"add_{count}")(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*(spelled.get(character, character) for character in CHARACTERS), "</s>"])
        writer.add_token_types([gguf.TokenType.NORMAL] * len(CHARACTERS) + [gguf.TokenType.CONTROL])
        writer.add_token_merges(["0 0"])
        writer.add_eos_token_id(len(CHARACTERS))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        options = llama_cpp.llama_model_default_params()
        options.vocab_only = True
        return llama_cpp.llama_model_load_from_file(path.encode(), options)


EXPORTS = [regex_of_python, regex_of_xgrammar, gbnf_of_xgrammar, regex_of_llguidance, gbnf_of_llguidance]
EXPORTS += [gbnf_of_llama_cpp]


@pytest.mark.parametrize("export", EXPORTS)
def test_exactly_our_strings_are_accepted(export):
    """10,000 strings, over ten shapes."""
    for shape in SHAPES:
        grammar = ours(*shape)
        theirs = export(grammar)
        answers = [accepts(grammar, text) for text in strings(*shape)]
        assert STRINGS / 3 < sum(answers) < STRINGS * 3 / 4 or shape == (1, 0, "")
        for text, right in zip(strings(*shape), answers, strict=True):
            assert theirs(text) == right, (shape, text)


def test_the_exports_can_be_read():
    grammar = ours(56, 511, " ")
    number = "([0-9]|[1-9][0-9]|[1-4][0-9][0-9]|50[0-9]|51[0-1])"
    assert grammar.regular_expression() == f" {number}( {number}){{55}}"
    assert grammar.gbnf() == (
        'root ::= " " number (" " number){55}\n'
        'number ::= [0-9] | [1-9] [0-9] | [1-4] [0-9] [0-9] | "5" "0" [0-9] | "5" "1" [0-1]\n'
    )


def test_an_answer_from_elsewhere_becomes_the_same_chunk():
    base = build_policy("nano")
    policy = VLAPolicy(base.model, base.processor, base.config.replace(relative_actions=True))
    (observation,) = observations(1)
    chunk = policy.predict_action_chunk([observation])[0]
    text = policy.action_tokenizer.encode(chunk, observation["state"])
    assert re.fullmatch(policy.grammar.regular_expression(), policy.chat_tokenizer.prefix + text)
    assert np.array_equal(policy.decode_answer(f" {text}", observation["state"]), chunk)
    with pytest.raises(ActionParseError, match="expected 8 integers, got 9"):
        policy.decode_answer(f"{text} 1", observation["state"])
