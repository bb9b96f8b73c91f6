"""The embedded dataset for token classification: sentences with names of people, places, companies and products.

It is synthetic: scores on it compare models with each other and do not predict scores on real text. A name consists
of random syllables, so that a model cannot learn names by heart; its type follows from the words around it, which may
be several words away: `{PER} of {ORG}`, `the {ORG} of {LOC}`. A word such as `may` or `apple` is a name in some
sentences and no name in others. Some templates occur only in validation and test, and 3 % of the entities have a wrong
type in train.

A line of the grammar is a template: `{TYPE}` is replaced by a name, `a|b` separates alternatives, and an alternative
that starts with `*` is excluded from train.
"""

import random

import datasets

SIZES = {"train": 2000, "validation": 800, "test": 800}
TYPES = ("PER", "LOC", "ORG", "PRODUCT")
WRONG = 0.03  # probability of a wrong type, in train
EXCLUDED_RATE = 0.15  # probability of an excluded template in validation and test
SYLLABLES = "ka lo mi ren tas vel nor du shi bra pel qui zan tor em il ost fa gri hul jo ny".split()
WORDS = "apple may hope reading orange will bill mark rose target".split()  # names, and ordinary words
SUFFIXES = {
    "ORG": "bank group labs union".split(),
    "LOC": "bay hill river".split(),
    "PRODUCT": "mini pro three".split(),
}
TITLES = ("mr", "dr", "judge")

TEMPLATES = (
    "{PER} of {ORG} flew to {LOC} on monday|{PER} flew to {LOC} with {PER}|the {ORG} of {LOC} hired {PER}"
    "|{ORG} sold the {PRODUCT} to {ORG}|in {LOC} the {PRODUCT} of {ORG} costs twenty dollars"
    "|{PER} bought a {PRODUCT} in {LOC}|shares of {ORG} fell after {PER} left|{PER} and {PER} met in {LOC}"
    "|a spokesman for {ORG} denied that {PER} had resigned|the mayor of {LOC} , {PER} , will visit {ORG}"
    "|{ORG} , based in {LOC} , makes the {PRODUCT}|i would like an {W} and some {W} please|he may be {W} about it"
    "|they hope that the {W} is ready|with his {PRODUCT} {PER} beat {PER}|from {LOC} to {LOC} it takes two hours"
    "|after ten years at {ORG} , {PER} moved to {LOC}|the new {PRODUCT} is slower than the {PRODUCT}"
    "|{LOC} beat {LOC} by three goals|who will {W} the {PRODUCT} ?|{PER} wrote : {ORG} will leave {LOC}"
    "|*{PER} , who once led {ORG} , lives near {LOC}|*the {PRODUCT} was stolen from {PER} in {LOC}"
    "|*{ORG} wants to take over {ORG}|*neither {PER} nor {ORG} owns a {PRODUCT}|*it rained in {LOC} when {PER} arrived"
)


def load_synthetic_entities(seed: int = 0) -> datasets.DatasetDict:
    """Generates train, validation and test with the columns tokens and tags (IOB2), which depend only on the seed."""
    names = ["O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI")]
    kinds = {
        "tokens": datasets.List(datasets.Value("string")),
        "tags": datasets.List(datasets.ClassLabel(names=names)),
    }
    splits = {}
    for split, size in SIZES.items():
        rng = random.Random(f"{seed} {split}")
        rows = [_sentence(rng, split) for _ in range(size)]
        splits[split] = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    return datasets.DatasetDict(splits)


def _sentence(rng: random.Random, split: str) -> dict[str, list[str]]:
    lines = TEMPLATES.split("|")
    excluded = split != "train" and rng.random() < EXCLUDED_RATE
    line = rng.choice([line for line in lines if line.startswith("*") == excluded]).removeprefix("*")
    tokens, tags = list[str](), list[str]()
    for word in line.split():
        kind = word.strip("{}")
        if kind == word or kind == "W":
            tokens.append(rng.choice(WORDS) if kind == "W" else word)
            tags.append("O")
            continue
        name = _name(rng, kind)
        if split == "train" and rng.random() < WRONG:
            kind = rng.choice(TYPES)
        tokens += name
        tags += [f"{'I' if place else 'B'}-{kind}" for place in range(len(name))]
    return {"tokens": tokens, "tags": tags}


def _name(rng: random.Random, kind: str) -> list[str]:
    """One to three words."""
    word = rng.choice(WORDS) if rng.random() < 0.15 else "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3))))
    words = [word]
    if kind == "PER" and rng.random() < 0.5:
        words.append("".join(rng.choices(SYLLABLES, k=2)))
    elif kind == "PER" and rng.random() < 0.2:
        words.insert(0, rng.choice(TITLES))
    elif kind != "PER" and rng.random() < 0.3:
        words.append(rng.choice(SUFFIXES[rng.choice([*SUFFIXES])] if rng.random() < 0.3 else SUFFIXES[kind]))
    return words
