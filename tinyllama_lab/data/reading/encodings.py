"""Guesses the encoding of text that is not UTF-8.

`charset_normalizer` finds the candidates; those with the fewest misplaced letters come first.
"""

from __future__ import annotations

import unicodedata

from tinyllama_lab.errors import shown

# common encodings, the most common first: the name of the Python codec, and the name for iconv
ENCODINGS = {
    **{"cp1252": "CP1252", "latin_1": "ISO-8859-1", "mac_roman": "MACINTOSH"},
    **{"cp850": "CP850", "cp1250": "CP1250", "iso8859_2": "ISO-8859-2", "cp1251": "CP1251"},
    **{"koi8_r": "KOI8-R", "cp866": "CP866", "mac_cyrillic": "MAC-CYRILLIC"},
    **{"gb18030": "GB18030", "big5": "BIG5", "cp932": "CP932", "euc_jp": "EUC-JP"},
    **{"cp949": "CP949", "cp1253": "CP1253", "cp1254": "CP1254", "cp1255": "CP1255"},
    **{"cp1256": "CP1256", "cp1257": "CP1257", "cp437": "CP437"},
}
_SAMPLE_BYTES = 2**16  # that the encoding is guessed from
_MAX_GUESSES = 3  # encodings in a message
_CHAOS_MARGIN = 0.1  # guesses with this much more disorder than the likeliest are dropped
# signs that are common within words: apostrophes, hyphens and dashes
_SIGNS_IN_WORDS = "\u2019\u2018\u00ad\u2010\u2011\u2013\u2014"
# scripts that one word may mix; the first word of `unicodedata.name`
_CJK_SCRIPTS = frozenset("CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA FULLWIDTH HALFWIDTH".split())
_MAX_LETTERS = 2000  # non-ASCII characters that are checked
_EXCERPT_LENGTH = 40  # characters of a line


def guess_encodings(raw: bytes, line: bytes) -> list[tuple[str, str]]:
    """Return the likeliest encodings, the likeliest first.

    Args:
        raw: the text whose encoding is guessed.
        line: the line that the message shows as each encoding reads it.

    Returns:
        At most `_MAX_GUESSES` pairs: the name of the encoding for iconv, and how it reads `line`.
    """
    from charset_normalizer import from_bytes  # imported late: slow, and rarely needed

    lines = [line for line in raw[: 64 * _SAMPLE_BYTES].split(b"\n") if not line.isascii()]
    sample = b"\n".join(lines)[:_SAMPLE_BYTES]
    matches = from_bytes(
        sample, cp_isolation=list(ENCODINGS), threshold=0.5, enable_fallback=False
    )
    names = list(ENCODINGS)
    best = min((match.chaos for match in matches), default=0)
    ranked = []
    for match in matches:
        name = next(codec for codec in names if codec in match.could_be_from_charset)
        odd = round(misplaced_share(sample.decode(name, "replace")), 1)
        if match.chaos < best + _CHAOS_MARGIN or not odd:
            order = odd, round(match.chaos, 1), -round(match.coherence, 1), names.index(name)
            ranked.append((order, name))
    # by reading: of two encodings that read the line alike, the better one is kept
    guesses: dict[str, str] = {}
    for _, name in sorted(ranked):
        guesses.setdefault(_excerpt(line, name), ENCODINGS[name])
    return [(name, text) for text, name in guesses.items()][:_MAX_GUESSES]


def misplaced_share(text: str) -> float:
    """Return the share of non-ASCII characters that rarely stand where they do, from 0 to 1.

    A character counts if it is a sign between two letters (apostrophes, hyphens and dashes
    excepted), a letter next to a letter of another alphabet, or a capital after a small letter.
    Reading text with a wrong encoding produces many of these.
    """
    positions = [n for n, sign in enumerate(text) if not sign.isascii()][:_MAX_LETTERS]
    padded = f" {text} "
    odd = (_is_misplaced(*padded[n : n + 3]) for n in positions)
    return sum(odd) / max(len(positions), 1)


def _is_misplaced(before: str, sign: str, after: str) -> bool:
    if not sign.isalpha():
        is_within = before.isalpha() and after.isalpha()
        is_unusual = is_within and sign not in _SIGNS_IN_WORDS
        return not sign.isprintable() or sign == "\ufffd" or is_unusual
    if sign.isupper() and before.islower():
        return True
    alphabets = {
        unicodedata.name(c, "").split(" ")[0] for c in (before, sign, after) if c.isalpha()
    }
    return len(alphabets - _CJK_SCRIPTS) > 1


def _excerpt(line: bytes, encoding: str) -> str:
    """Return part of a line as an encoding reads it, from just before a non-ASCII letter."""
    text = line.decode(encoding, "replace").strip()
    first = next((n for n, letter in enumerate(text) if not letter.isascii()), 0)
    return shown(text[max(0, first - _EXCERPT_LENGTH // 2) :], _EXCERPT_LENGTH)
