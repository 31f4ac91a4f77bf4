"""Sentences of a text, by a documented rule that needs no download; made for English, usable for many languages.

A sentence ends
- at an end mark (. ! ? and their kin in other scripts, several of them, an ellipsis), with any closing quotes and
  brackets after it, before white space; marks of scripts without blanks between sentences need no white space;
- at a blank line, whatever stands before it.

It does not end at a mark when the next word begins in lower case; nor at a full stop after an abbreviation that never
ends a sentence (Mr. Prof. e.g. vs.), after an initial (J. R. R.), after a number that begins a line (a list), or after
an abbreviation that a number follows (No. 5, pp. 3). A stop inside a number, address or name has no white space after
it. Abbreviations that may end a sentence (etc. Inc. p.m.) do so before a word with a capital.
"""

import re

# Never at the end of a sentence: a name, a title or an explanation follows. In lower case, without the last stop.
TITLES = frozenset(
    "mr mrs ms messrs mx dr prof rev fr sr sra hon st ste mt gen col maj capt cmdr lt sgt cpl pvt adm gov sen rep pres "
    "supt insp vs cf viz e.g i.e eg ie ca resp approx incl esp".split()
)
# Before a number they do not end a sentence.
NUMBERED = frozenset(
    "no nos fig figs vol vols p pp ch chap sec sect art eq eqs ref refs ed eds op cit al ver "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)

DOUBLE_QUOTES, SINGLE_QUOTES = "\u201c\u201d", "\u2018\u2019"
CLOSERS = "\"')]}\u00bb\u203a" + DOUBLE_QUOTES[1] + SINGLE_QUOTES[1]
OPENERS = "\"'([{\u00ab\u2039\u00bf\u00a1" + DOUBLE_QUOTES[0] + SINGLE_QUOTES[0]
DASHES = "-\u2013\u2014"
# Followed by white space: Latin, interrobang and doubled marks, Arabic, Urdu, Devanagari, Ethiopic.
ENDS = ".!?\u2026\u203d\u2047\u2048\u2049\u061f\u06d4\u0964\u0965\u1362"
# In scripts that put no blank between sentences: ideographic and full-width marks, and the brackets that close there.
WIDE_ENDS = "\u3002\uff01\uff1f\uff61\uff0e"
WIDE_CLOSERS = "\u300d\u300f\uff09\u3011"
_CLOSERS, _OPENERS = re.escape(CLOSERS), re.escape(OPENERS)

# What may part two sentences: a blank line, or an end mark with its closers and the white space after it.
# A run of marks is tried once, from its first (a second start in each would take quadratic time).
CANDIDATE = re.compile(
    rf"(?P<line>\n\s*\n\s*)"
    rf"|(?P<wide>[{WIDE_ENDS}][{WIDE_ENDS}{WIDE_CLOSERS}{_CLOSERS}]*\s*)"
    rf"|(?<![{ENDS}])(?P<mark>[{ENDS}]++)[{_CLOSERS}]*+(?P<space>\s+)"
)
NEXT_WORD = re.compile(rf"[{_OPENERS}{re.escape(DASHES)}]*(\S)")
LAST_WORD = re.compile(rf"[^\s{_OPENERS}{DASHES[1:]}]*\Z")
LONGEST_WORD = 32  # characters looked at before a full stop
LONGEST_ITEM = 3  # digits of a number that counts the items of a list


def split_sentences(text: str, *, keep_newlines: bool = False) -> list[str]:
    """The sentences of a text in order, none of them empty.

    White space between them belongs to neither, unless keep_newlines: then it stays at the end of the sentence before
    it, so that the sentences joined are the text.
    """
    sentences: list[str] = []
    begin = 0
    for candidate in CANDIDATE.finditer(text):
        if candidate.end() < len(text) and _is_end(text, begin, candidate):
            sentences.append(text[begin : candidate.end()])
            begin = candidate.end()
    sentences.append(text[begin:])
    if not keep_newlines:
        sentences = [sentence.strip() for sentence in sentences]
    return [sentence for sentence in sentences if sentence]


def _is_end(text: str, begin: int, candidate: re.Match[str]) -> bool:
    """Whether the sentence that starts at begin ends with this candidate."""
    if candidate["mark"] is None:
        return True
    if candidate["space"].count("\n") > 1:
        return True
    following = NEXT_WORD.match(text, candidate.end())
    first = following[1] if following else ""
    if first.islower():
        return False
    if candidate["mark"] != ".":
        return True
    stop = candidate.start()
    found = LAST_WORD.search(text, max(begin, stop - LONGEST_WORD), stop)
    word = found[0] if found else ""
    if not word:
        return True
    if len(word) == 1 and word.isupper():
        return False  # an initial
    if word.lower() in TITLES:
        return False
    if first.isdigit() and word.lower() in NUMBERED:
        return False
    return not (word.isdigit() and len(word) <= LONGEST_ITEM and _begins_line(text, begin, stop - len(word)))


def _begins_line(text: str, begin: int, place: int) -> bool:
    """Whether only white space stands before a place on its line, or between begin and the place."""
    line = max(begin, text.rfind("\n", begin, place) + 1)
    return not text[line:place].strip()
