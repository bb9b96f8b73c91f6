"""The embedded translation dataset: numbers in words, English to German, written by a small grammar, no download.

It is synthetic: scores on it compare models with each other, and do not predict scores on real translation. The task
is German word order: "twenty one" is "einundzwanzig" (one and twenty), written as one word, half past three is "halb
vier" (half four), and verbs move to the end of clauses. Numbers go up to 999,999. A template is a sentence with its
translations; each slot, `{number}` or `{number2}`, is filled with a phrase in both languages. In train, a third of the
sentences whose template has several translations use another one than the first; validation and test use the first.
"""

import random
import re
from collections.abc import Callable
from itertools import islice

import datasets

SIZES = {"train": 12000, "validation": 500, "test": 500}
OTHER_TRANSLATION = 1 / 3  # train only

ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
GERMAN = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
ENGLISH_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip
GERMAN_ORDINALS = {"eins": "erste", "drei": "dritte", "sieben": "siebte", "acht": "achte"}

THINGS = {
    "apples": "Äpfel", "houses": "Häuser", "books": "Bücher", "trees": "Bäume", "birds": "Vögel", "letters": "Briefe",
    "windows": "Fenster", "ships": "Schiffe", "stones": "Steine", "chairs": "Stühle", "stamps": "Briefmarken",
    "candles": "Kerzen", "bottles": "Flaschen", "horses": "Pferde",
}  # fmt: skip
NAMES = {name: name.title() for name in ("anna", "paul", "maria", "jonas", "clara", "felix")}
CITIES = {"berlin": "Berlin", "vienna": "Wien", "munich": "München", "cologne": "Köln", "zurich": "Zürich"}
DAYS = {
    "monday": "Montag", "tuesday": "Dienstag", "wednesday": "Mittwoch", "thursday": "Donnerstag", "friday": "Freitag",
    "saturday": "Samstag", "sunday": "Sonntag",
}  # fmt: skip
MONTHS = {
    "january": "Januar", "february": "Februar", "march": "März", "april": "April", "may": "Mai", "june": "Juni",
    "july": "Juli", "august": "August", "september": "September", "october": "Oktober", "november": "November",
    "december": "Dezember",
}  # fmt: skip

TEMPLATES = {  # "|" separates German translations
    "{number}": "{number}",
    "the {ordinal}": "der {ordinal}",
    "minus {number}": "minus {number}",
    "{small} point {digit}": "{small} Komma {digit}",
    "{number} euros and {small} cents": "{number} Euro und {small} Cent|{number} Euro {small}",
    "{name} owes you {number} euros": "{name} schuldet dir {number} Euro|du bekommst von {name} {number} Euro",
    "the {things} cost {number} euros": "die {things} kosten {number} Euro|{number} Euro kosten die {things}",
    "how much is {small} times {number}": "wie viel ist {small} mal {number}|was ergibt {small} mal {number}",
    "if you add {number} to {number2}": "wenn man {number} zu {number2} addiert|"
    "wenn man zu {number2} noch {number} addiert",
    "page {number} of {number2}": "Seite {number} von {number2}|von {number2} Seiten die Seite {number}",
    "because there are {number} {things} here": "weil es hier {number} {things} gibt|weil hier {number} {things} sind",
    "{name} bought {number} {things} on {day}": "{name} hat am {day} {number} {things} gekauft|"
    "am {day} hat {name} {number} {things} gekauft|{name} kaufte am {day} {number} {things}",
    "{name} has {number} {things} and {small} {things2}": "{name} hat {number} {things} und {small} {things2}|"
    "{name} hat {small} {things2} und {number} {things}",
    "{number} kilometers from {city} to {city2}": "{number} Kilometer von {city} nach {city2}|"
    "von {city} nach {city2} sind es {number} Kilometer",
    "it was minus {small} degrees in {city} on {day}": "am {day} waren es in {city} minus {small} Grad|"
    "in {city} waren es am {day} minus {small} Grad",
    "it is {time}": "es ist {time}|wir haben {time}",
    "the train to {city} leaves at {time}": "der Zug nach {city} fährt um {time} ab|"
    "um {time} fährt der Zug nach {city} ab",
    "on {day} at {time}": "am {day} um {time}|um {time} am {day}",
    "the {date} of {month} {year}": "der {date} {month} {year}|der {date} {month} im Jahr {year}",
    "{name} was born on the {date} of {month} {year}": "{name} wurde am {date}n {month} {year} geboren|"
    "{name} kam am {date}n {month} {year} zur Welt",
    "the {ordinal} house on the left": "das {ordinal} Haus links|links das {ordinal} Haus",
}


def english(number: int) -> str:
    """Words of 0 to 999,999, as in "four hundred and twenty one"."""
    if number < 20:
        return ENGLISH[number]
    if number < 100:
        return _joined(ENGLISH_TENS[number // 10 - 2], " ", number % 10, english)
    if number < 1000:
        return _joined(f"{ENGLISH[number // 100]} hundred", " and ", number % 100, english)
    rest = number % 1000
    return _joined(f"{english(number // 1000)} thousand", " and " if rest < 100 else " ", rest, english)


def german(number: int) -> str:
    """Words of 0 to 999,999, as in "vierhunderteinundzwanzig"."""
    if number < 20:
        return GERMAN[number]
    if number < 100:
        tens = GERMAN_TENS[number // 10 - 2]
        return f"{_prefix(number % 10)}und{tens}" if number % 10 else tens
    if number < 1000:
        return _joined(f"{_prefix(number // 100)}hundert", "", number % 100, german)
    return _joined(f"{_prefix(number // 1000)}tausend", "", number % 1000, german)


def _joined(head: str, between: str, rest: int, words: Callable[[int], str]) -> str:
    return f"{head}{between}{words(rest)}" if rest else head


def _prefix(number: int) -> str:
    """A German number as the beginning of a longer one: a final "eins" becomes "ein"."""
    words = german(number)
    return words[:-1] if words.endswith("eins") else words


def english_ordinal(number: int) -> str:
    *before, last = english(number).split()
    ordinal = ENGLISH_ORDINALS.get(last) or (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return " ".join([*before, ordinal])


def german_ordinal(number: int) -> str:
    """The weak form in the nominative, as in "der dritte"."""
    words = german(number)
    last = number % 100
    if not 1 <= last <= 19:
        return f"{words}ste"
    name = GERMAN[last]
    return words.removesuffix(name) + GERMAN_ORDINALS.get(name, f"{name}te")


def year(number: int) -> tuple[str, str]:
    """Years from 1100 to 1999 are counted in hundreds in both languages."""
    if number >= 2000:
        return english(number), german(number)
    century, rest = divmod(number, 100)
    below = " hundred" if rest == 0 else f" oh {english(rest)}" if rest < 10 else f" {english(rest)}"
    return english(century) + below, _joined(f"{german(century)}hundert", "", rest, german)


def time(hour: int, minutes: int) -> tuple[str, str]:
    """Twelve hours and multiples of five minutes. German times refer to the next half hour."""
    following = hour % 12 + 1
    distance = minutes if minutes <= 30 else 60 - minutes
    this = hour if minutes <= 30 else following
    if minutes == 0:
        return f"{english(hour)} o'clock", f"{'ein' if hour == 1 else german(hour)} Uhr"
    if minutes == 30:
        return f"half past {english(hour)}", f"halb {german(following)}"
    side, seite = ("past", "nach") if minutes < 30 else ("to", "vor")
    if distance == 15:
        return f"quarter {side} {english(this)}", f"Viertel {seite} {german(this)}"
    words = f"{english(distance)} {side} {english(this)}"
    if distance == 25:
        return words, f"fünf {'vor' if minutes < 30 else 'nach'} halb {german(following)}"
    return words, f"{german(distance)} {seite} {german(this)}"


class _Generator:
    """Draws sentences with their translations. Numbers are drawn by number of digits, so that small ones occur."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"number_words {seed}")

    def below(self, digits: int) -> int:
        return self.rng.randrange(2, 10 ** self.rng.randint(1, digits))

    def phrase(self, kind: str) -> tuple[str, str]:
        """A phrase for a slot in both languages."""
        words = {"things": THINGS, "name": NAMES, "city": CITIES, "day": DAYS, "month": MONTHS}
        if kind in words:
            return self.rng.choice(list(words[kind].items()))
        if kind == "time":
            return time(self.rng.randint(1, 12), self.rng.randrange(0, 60, 5))
        if kind == "year":
            return year(self.rng.randrange(1100, 2100))
        if kind in ("ordinal", "date"):
            number = self.below(4) if kind == "ordinal" else self.rng.randint(1, 31)
            return english_ordinal(number), german_ordinal(number)
        number = self.below({"number": 6, "small": 2, "digit": 1}[kind])
        return english(number), german(number)

    def sentence(self) -> tuple[str, list[str]]:
        """An English sentence, and its German translations."""
        source, targets = self.rng.choice(list(TEMPLATES.items()))
        filled = {slot: self.phrase(slot.rstrip("2")) for slot in re.findall(r"{(\w+)}", source)}
        english_words, german_words = ({slot: phrases[side] for slot, phrases in filled.items()} for side in (0, 1))
        return source.format(**english_words), [target.format(**german_words) for target in targets.split("|")]

    def choose(self, translations: list[str], split: str) -> str:
        usual, *others = translations
        return (
            self.rng.choice(others) if others and split == "train" and self.rng.random() < OTHER_TRANSLATION else usual
        )


def load_number_words(seed: int = 0) -> datasets.DatasetDict:
    """Generates train, validation and test with the columns en and de. No English sentence occurs twice."""
    generator, found = _Generator(seed), dict[str, list[str]]()
    while len(found) < sum(SIZES.values()):
        source, targets = generator.sentence()
        found.setdefault(source, targets)
    pairs = list(found.items())
    generator.rng.shuffle(pairs)  # new sentences get longer, since short ones repeat soon
    splits, rest = {}, iter(pairs)
    for split, size in SIZES.items():
        rows = [{"en": source, "de": generator.choose(targets, split)} for source, targets in islice(rest, size)]
        splits[split] = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict(splits)
