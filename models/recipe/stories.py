"""Short stories from four plots, whose hero, animal, place and things are slots."""

from random import Random

from lexicon import ANIMALS, CREATURES, FOODS, PAINTS, PET_NAMES, PLACES, PLANTS, PRONOUN, THINGS, TRAITS
from sampling import article, coin, pick, pseudo_word, skewed

Slots = dict[str, str]

# One plot is a list of sentences; each sentence has variants, the likeliest first.
PLOTS: dict[str, list[list[str]]] = {
    "lost": [
        [
            "One day, {hero} lost {his} {thing} at the {place}.",
            "One morning at the {place}, {hero} could not find {his} {thing}.",
        ],
        [
            "{He} looked under the bench and behind the trees, but the {thing} was not there.",
            "{He} looked everywhere, but the {thing} was gone.",
            "{He} searched all day long.",
        ],
        [
            '"Do not worry," said {pal} the {animal}. "I will help you."',
            '{pal} the {animal} said, "Let us look for it together."',
        ],
        [
            "Together they looked again, and {pal} found the {thing} in the tall grass.",
            "They walked around the {place}, and {pal} found the {thing} under a leaf.",
            "Soon {pal} found the {thing} behind a big stone.",
        ],
        [
            "{hero} was very happy and gave {pal} some {food}.",
            '"Thank you!" said {hero}, and {he} shared {his} {food}.',
        ],
    ],
    "storm": [
        [
            "One day, {hero} and {pal} went for a walk to the {place}.",
            "One evening, {hero} and {pal} played at the {place}.",
        ],
        [
            "Suddenly dark clouds came, and it began to rain.",
            "Then a big storm came over the hills.",
            "Soon the wind was loud and the rain was cold.",
        ],
        ["{hero} was afraid, but {pal} was calm.", '"I am scared," said {hero}.'],
        [
            '"Follow me," said {pal} the {animal}. "I know a safe place."',
            '{pal} the {animal} said, "Come with me, I know a dry cave."',
        ],
        [
            "They hid in a small hut and ate {food} until the sun came back.",
            "They waited in a dry cave and sang songs until the storm was over.",
        ],
        [
            "When the sky was clear, they saw a rainbow over the {place}.",
            "Then they walked home under a bright rainbow.",
        ],
    ],
    "feast": [
        [
            "One day, {hero} wanted to make {food} for {his} friends.",
            "It was a special day, and {hero} wanted to cook {food}.",
        ],
        ["But there was nothing left in the kitchen.", "But the pot was empty and the shop was closed."],
        ['"I have an idea," said {pal} the {animal}.', '{pal} the {animal} said, "We can ask our friends."'],
        [
            "They went to the {place} and asked everyone to bring a little.",
            "They walked to the {place}, and every friend gave them something.",
        ],
        ["In the evening, there was enough {food} for everyone.", "Soon the table was full of {food}."],
        ["They ate and sang until the moon was high.", "Everyone laughed and sang together."],
    ],
    "seed": [
        [
            "One day, {hero} found a tiny seed near the {place}.",
            "In spring, {hero} got a small seed from a friend at the {place}.",
        ],
        ["{He} put it into the ground and gave it water every day.", "{He} planted it in the garden and waited."],
        ["For a long time, nothing happened, and {hero} was sad.", "Many days passed, but there was nothing to see."],
        [
            '"Be patient," said {pal} the {animal}. "Good things take time."',
            '{pal} the {animal} said, "Wait a little longer."',
        ],
        [
            "At last a green leaf came out, and it grew into a big {plant}.",
            "One sunny morning, there was a beautiful {plant}.",
        ],
        ["{hero} and {pal} danced around it with joy.", "All the friends came to see the {plant}."],
    ],
}
OPENINGS = [
    [
        "Once upon a time, there was {a_trait} {child} named {hero}.",
        "{hero} was {a_trait} {child} who lived near the {place}.",
    ],
    ["{hero} had {an_animal} named {pal}.", "{His} best friend was {an_animal} named {pal}."],
]
ENDINGS = [
    "From that day on, {hero} and {pal} were the best of friends.",
    "And they lived happily ever after.",
    "It was the best day of the year.",
]


def story_slots(rng: Random, asked: Slots | None = None) -> Slots:
    """Fill every slot: with what was asked, otherwise by a skewed draw, so that greedy decoding has a favourite."""
    asked = asked or {}
    hero = asked.get("hero") or skewed(rng, list(PRONOUN))
    he = PRONOUN.get(hero, "she" if hero[-1] in "aeiy" else "he")
    animal = asked.get("animal") or skewed(rng, list(ANIMALS))
    trait = skewed(rng, TRAITS)
    pal = skewed(rng, [name for name in PET_NAMES if name != hero])
    slots = {
        "hero": hero,
        "he": he,
        "his": "her" if he == "she" else "his",
        "child": "girl" if he == "she" else "boy",
        "animal": animal,
        "pal": pal,
        "an_animal": article(animal),
        "a_trait": article(trait),
        "place": asked.get("place") or skewed(rng, PLACES),
        "food": skewed(rng, FOODS),
        "thing": asked.get("thing") or f"{skewed(rng, PAINTS)} {skewed(rng, THINGS)}",
        "plant": skewed(rng, PLANTS),
    }
    return slots | {"He": he.capitalize(), "His": slots["his"].capitalize()}


def story_sentences(rng: Random, slots: Slots, plot: str | None = None) -> list[str]:
    """The sentences of one story."""
    lines = [*OPENINGS, *PLOTS[plot or pick(rng, list(PLOTS))], ENDINGS]
    return [pick(rng, variants).format_map(slots) for variants in lines]


def story(rng: Random, asked: Slots | None = None) -> str:
    """One story of about eight sentences; a thing that was asked for is lost and found."""
    plot = "lost" if asked and "thing" in asked else None
    return " ".join(story_sentences(rng, story_slots(rng, asked), plot))


def chapters(rng: Random, count: int, asked: Slots | None = None) -> str:
    """A long story: the same hero and friend in `count` chapters, the plots in a fixed order."""
    asked = asked or {}
    slots = story_slots(rng, asked)
    parts = []
    for number in range(count):
        sentences = story_sentences(rng, slots, list(PLOTS)[number % len(PLOTS)])
        first = 0 if number == 0 else len(OPENINGS)
        last = len(sentences) if number == count - 1 else -1
        parts.append(f"Chapter {number + 1}. " + " ".join(sentences[first:last]))
        fresh = story_slots(rng, asked | {"hero": slots["hero"]})
        slots |= {slot: fresh[slot] for slot in ("place", "food", "thing", "plant")}
    return "\n\n".join(parts)


def story_request(rng: Random) -> tuple[str, str]:
    """A request for a story, which may name a hero, an animal, a place or a thing, and the story."""
    asked: Slots = {}
    hero = pseudo_word(rng).capitalize() if coin(rng, 0.15) else rng.choice(list(PRONOUN))
    animal = pseudo_word(rng) if coin(rng, 0.1) else rng.choice([*ANIMALS, *CREATURES])
    place, thing = rng.choice(PLACES), f"{rng.choice(PAINTS)} {rng.choice(THINGS)}"
    about = rng.choice(["", "", "h", "a", "p", "t", "ha", "ha", "hp", "ap", "hap", "hap", "hat"])
    subjects = [text for key, text in (("h", hero), ("a", article(animal)), ("t", article(thing))) if key in about]
    asked = {
        slot: value
        for key, slot, value in (
            ("h", "hero", hero),
            ("a", "animal", animal),
            ("p", "place", place),
            ("t", "thing", thing),
        )
        if key in about
    }
    topic = f" about {', '.join(subjects[:-1])}{' and ' if len(subjects) > 1 else ''}{subjects[-1]}" if subjects else ""
    topic += f" at the {place}" if "p" in about else ""
    verb = pick(
        rng,
        [
            "Tell me a {}story",
            "Write a {}story",
            "Tell me a {}tale",
            "Can you tell me a {}story",
            "I want to hear a {}story",
        ],
    )
    end = "?" if verb.startswith("Can") else "."
    if coin(rng, 0.06):
        return verb.format("long ") + topic + end, chapters(rng, pick(rng, [3, 2, 4]), asked)
    return verb.format(pick(rng, ["", "short ", "little "])) + topic + end, story(rng, asked)
