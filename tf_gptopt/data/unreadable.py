"""What bytes are that are no UTF-8 text, and what to do about it. Needs no TensorFlow.

A wrong guess here costs somebody a model of garbage, so an encoding is named only where the text
decodes to what people write in it; otherwise the advice is to find out. (charset-normalizer 3.5
names Korean for Japanese in EUC-JP, and cp1250 for German in cp1252.)
"""

from __future__ import annotations

_SAMPLE = 1 << 16  # bytes that a guess looks at

# How files begin: what they are, and how they become text
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF-", "a PDF document", "Take its text out first: pdftotext -enc UTF-8 {name}"),
    (b"\x89PNG", "a picture", ""),
    (b"\xff\xd8\xff", "a picture", ""),
    (b"GIF8", "a picture", ""),
    (b"PK\x03\x04", "a ZIP archive (or a document that is one: .docx, .odt, .epub)",
     "Unpack it first, or turn the document into text: pandoc -t plain -o text.txt {name}"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "Save it as plain text (UTF-8) first"),
    (b"{\\rtf", "an RTF document", "Save it as plain text (UTF-8) first"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "Unpack it first"),
    (b"Rar!", "a RAR archive", "Unpack it first"),
    (b"PAR1", "a Parquet table",
     "Write its text column as .jsonl first, for example with pandas: "
     "read_parquet(...).to_json(..., orient='records', lines=True)"),
    (b"SQLite format 3", "an SQLite database", "Write its text as .jsonl first"),
    (b"\x7fELF", "a program", ""),
    (b"\x1f\x8b", "gzip data", "Name it with .gz at the end, and it is read"),
    (b"BZh", "bzip2 data", "Name it with .bz2 at the end, and it is read"),
    (b"\xfd7zXZ", "xz data", "Name it with .xz at the end, and it is read"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "Name it with .zst at the end, and it is read"),
)  # fmt: skip
_TAR = b"ustar"
_TAR_AT = 257  # bytes before it
_MARKS = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"),
          (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))  # fmt: skip

# Characters that are frequent in what is written in each encoding, and which share of all beyond
# ASCII they make at least where a text decodes to such
_KANA = "のにはをたがでとしれさあいるんかもなてすこまけりそくっらせ、。"
_ENCODINGS: tuple[tuple[str, str, float, str], ...] = (
    (
        "gb18030", "Chinese", 0.15,
        "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过",
    ),
    (
        "big5", "Chinese", 0.15,
        "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過",
    ),
    ("euc_kr", "Korean", 0.15, "이다는에을의가지고하도로한기은사나를서리어자그대인만해시라"),
    ("shift_jis", "Japanese", 0.3, _KANA),
    ("euc_jp", "Japanese", 0.3, _KANA),
    ("cp1251", "Cyrillic", 0.5, "оеаинтсрвл"),
    ("koi8-r", "Cyrillic", 0.5, "оеаинтсрвл"),
    ("iso8859-7", "Greek", 0.5, "αοιετσνηυρ"),
    (
        "cp1252", "Western European", 0.8,
        "éèêëàâäáãåçñöôóòõøüúùûïîíìßæœÉÀÄÖÜ\u2018\u2019\u201c\u201d\u2013\u2014…«»°§€£",
    ),
)  # fmt: skip
_ALPHABETS = ("cp1251", "koi8-r", "iso8859-7")  # whose letters are no ASCII
_MIXED = 0.3  # of the letters: accents are rarer, and such an alphabet is nearly all of them


def advice(name: str, raw: bytes) -> str:
    """A sentence or two on a file that is no UTF-8 text: what it is, and what to do."""
    for start, what, remedy in _KINDS:
        if raw.startswith(start):
            remedy = remedy.format(name=name) if remedy else "Leave it out"
            return f"It is {what}. {remedy}."
    if raw.startswith(_TAR, _TAR_AT):
        return "It is a tar archive. Unpack it first (tar -xf), and name the folder."
    if encoding := guess_encoding(raw):
        shown, language = encoding
        kind = f" ({language})" if language else ""
        return f"It looks like {shown}{kind}: iconv -f {shown} -t UTF-8 {name} > utf8-{name}"
    if _is_binary(raw):
        return "It is no text at all, so leave it out."
    return (
        f"Find out its encoding (an editor or `file -i {name}` says), and convert it: "
        f"iconv -f ENCODING -t UTF-8 {name} > utf8-{name}"
    )


def guess_encoding(raw: bytes) -> tuple[str, str] | None:
    """The encoding, as `iconv` calls it, and what is written in it; None where nothing is sure."""
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return encoding, ""
    sample = raw[:_SAMPLE]
    if zeros := sample.count(0):
        return _guess_without_mark(sample, zeros)
    best, found = 0.0, None
    for encoding, language, least, characters in _ENCODINGS:
        score = _score(sample, encoding, set(characters))
        if score > max(best, least):
            best, found = score, (encoding.upper().replace("_", "-"), language)
    return found


def _guess_without_mark(sample: bytes, zeros: int) -> tuple[str, str] | None:
    """UTF-16 of mostly Latin text has a zero in every other byte."""
    if zeros < max(4, len(sample) / 4):
        return None
    odd = sample[1::2].count(0)
    encoding = "UTF-16LE" if odd > zeros / 2 else "UTF-16BE"
    try:
        text = sample[: len(sample) // 2 * 2].decode(encoding)
    except UnicodeDecodeError:
        return None
    return (encoding, "") if _letters(text) > len(text) / 2 else None


def _score(sample: bytes, encoding: str, characters: set[str]) -> float:
    """Which share of what is not ASCII are these characters, if the sample is in this encoding."""
    text = _decoded(sample, encoding)
    beyond = [character for character in text if character > "\x7f"]
    mostly = sum(map(str.isalpha, beyond)) > _MIXED * sum(map(str.isalpha, text))
    if not beyond or (encoding in _ALPHABETS and not mostly):
        return 0.0
    if encoding == "cp1252" and mostly:
        return 0.0
    return sum(character in characters for character in beyond) / len(beyond)


def _decoded(sample: bytes, encoding: str) -> str:
    """The text, or none; a sample may end in the middle of a character."""
    try:
        return sample.decode(encoding)
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 4:
            return ""
        return sample[: error.start].decode(encoding)


def _letters(text: str) -> int:
    return sum(character.isalnum() or character.isspace() for character in text)


def _is_binary(raw: bytes) -> bool:
    """Whether control characters, which no text has, are many."""
    sample = raw[:_SAMPLE]
    controls = sum(sample.count(bytes([byte])) for byte in (*range(9), *range(14, 27), 28, 29, 30))
    return controls > len(sample) / 50
