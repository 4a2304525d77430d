"""Does a converted tokenizer cut text as its source does? Checked before it is written.

Both are run on a fixed set of hard texts, and on texts of the vocabulary: pieces that share a score, where the two
orders of merges differ (`llmkit.tokenization.bpe`). Differences are reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from llmkit.tokenization.sentencepiece_model import SPACE

Encode = Callable[[str], list[int]]

TEXTS = (
    "", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", " a", "  a", "a ", "a  ", "a  b", "a   b",
    "a    b", "          ten", "a\tb", "a\n\nb\n", "\ta\n\tb\n", "trailing \n", "x\u00a0y", "x\u3000y",
    "x\u2003y\u200by\u2060z", SPACE, f"a{SPACE}b", f"a{SPACE}{SPACE}b", f"{SPACE}{SPACE}{SPACE}", f" {SPACE} a",
    "0", "7 42 1970", "3.14159265", "1,234,567.89", "12345678901234567890", "x1y22z333",
    "\u0661\u0662\u0663 \u0967\u0968 \uff11\uff12", "I'll don't they've it's",
    "The quick brown fox jumps over the lazy dog.", "HELLO World iPhone McDonald's", "antidisestablishmentarianism",
    "e-mail: a.b@c.example; https://example.org/x?y=1&z=%20#q", "naïve café Ærøskøbing Straße ŁÓDŹ",
    "cafe\u0301 n\u0303 A\u030a", "\u212b \ufb01 \u2460 \u2122 \uff21\uff22", "Привет, как дела?", "Καλημέρα κόσμε",
    "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "xin chào thế giới", "안녕하세요 세계",
    "\u1112\u1161\u11ab", "こんにちは、世界。カタカナ", "你好，世界！", "人工智能与机器学习", "中国的首都是北京。",
    "下列关于细胞的叙述，正确的是（　　）", "的的的的的", "一二三四五六七八九十百千万", "他说：“今天天气很好。”",
    "A. 光合作用 B. 呼吸作用 C. 蒸腾作用 D. 分裂", "臺灣繁體字 龍龜鬱", "𠮷野家 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓂀",
    "中英 mixed 文本 with 123 数字", "🙂", "🙂🙂", "👩‍👩‍👧‍👦 family", "👍🏽 🇨🇳🇺🇸 ✈️ ☕",
    "def f(x):\n    return x ** 2  # y\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "<html><p class=\"x\">a &amp; b</p></html>", "{\"k\": [1, null, true]}",
    "\\frac{a}{b} + \\sum_{i=1}^{n} x_i^2 \\leq \\infty", "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−L|<ε", "x² + y₁ ≠ √z ± ½",
    "a==b!=c<=d>=e&&f||g", "!!! ??? ... --- ___ *** ###", "\"quoted\" 'single' `code` «x» „y“",
    "$5 €6 £7 ¥8 ₹9 50% №1", "\x01\x02\x7f", "a\x0bb\x0cc\x1b[0m", "\ufeffBOM", "\ufffd\ufffe", "\ue000\U000f0000",
    "<s>", "</s>", "<unk>", "<pad> [MASK] <|endoftext|>", "<0x0A><0x41>", "[INST] hi [/INST]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "abababababababab", "ab ab  ab   ab", "lorem " * 12, "ﷺ ﷽",
    "\u202eright\u202c",
)  # fmt: skip
_MOST_TIED = 300


@dataclass(frozen=True, slots=True)
class Difference:
    """Texts that two tokenizers cut otherwise.

    Attributes:
        n, n_texts: how many of how many.
        text: the shortest of them.
        expected, found: its ids by the exact tokenizer, and by the one that was made.
    """

    n: int
    n_texts: int
    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...]

    def __str__(self) -> str:
        example = f"{self.text!r} is {_short(self.found)}, not {_short(self.expected)}"
        return f"{self.n} of {self.n_texts} test texts get other ids ({example})"


def compare(
    exact: Encode, other_encode: Encode, *, more: Iterable[str] = (), without: Collection[str] = ()
) -> Difference | None:
    """Cut every text of the hard set, and `more`, by both; None where all ids are equal.

    Args:
        without: texts that hold one of these strings are left out: tokens that only one of the two knows.
    """
    texts = [text for text in dict.fromkeys((*TEXTS, *more)) if not any(token in text for token in without)]
    other = [(text, e, m) for text in texts if (e := tuple(exact(text))) != (m := tuple(other_encode(text)))]
    if not other:
        return None
    text, expected, ids = min(other, key=lambda item: len(item[0]))
    return Difference(len(other), len(texts), text, expected, ids)


def tied_texts(scores: Mapping[str, float]) -> list[str]:
    """Up to `_MOST_TIED` texts of pieces that share their score with others, spaces as spaces.

    Half are chains: the end of one such piece begins the next, so that which of the two is made depends on the order.
    """
    sharing: dict[float, list[str]] = defaultdict(list)
    for text, score in scores.items():
        if len(text) > 1:
            sharing[score].append(text)
    tied = [text for group in sharing.values() if len(group) > 1 for text in group]
    by_start: dict[tuple[float, str], str] = {}
    for text in tied:
        by_start.setdefault((scores[text], text[0]), text)
    step = max(1, 2 * len(tied) // _MOST_TIED)
    chains = []
    for text in tied[::step]:
        follower = by_start.get((scores[text], text[-1]))
        if follower is not None:
            third = by_start.get((scores[text], follower[-1]), "")
            chains.append(text + follower[1:] + third[1:])
    rows = ["".join(tied[i : i + 8]) for i in range(0, len(tied), 8)]
    chosen = [*chains, *rows[:: max(1, 2 * len(rows) // _MOST_TIED)]]
    return [text.replace(SPACE, " ") for text in chosen]


def _short(ids: tuple[int, ...]) -> str:
    return str(list(ids[:6]))[:-1] + (", …]" if len(ids) > 6 else "]")
