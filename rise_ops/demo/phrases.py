"""Clean rows of the demo corpus, from templates: support, kitchen, travel, tutoring and forum answers.

Each generator takes a seeded `random.Random` and returns one example. The texts are believable, short and
varied enough that a row is hardly ever repeated; they are not meant to teach anybody anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import NamedTuple


class Example(NamedTuple):
    """One instruction and its answer; `input` is what the instruction works on, often empty."""

    instruction: str
    input: str
    output: str


Maker = Callable[[Random], Example]

_PRODUCTS = (
    "desk lamp", "rain jacket", "coffee grinder", "bicycle helmet", "standing desk", "water filter", "yoga mat",
    "wireless mouse", "camping stove", "reading chair", "phone case", "garden hose", "travel mug", "toaster",
    "backpack", "air purifier", "wall clock", "keyboard", "sleeping bag", "electric kettle",
)  # fmt: skip
_FAULTS = (
    "stopped working after a week", "arrived with a scratch", "is missing a screw", "makes a rattling noise",
    "does not switch on", "came in the wrong colour", "smells of plastic", "is smaller than I expected",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")
_CITIES = (
    "Lisbon", "Kyoto", "Ghent", "Tallinn", "Porto", "Bologna", "Krakow", "Bergen", "Valencia", "Ljubljana",
    "Leipzig", "Cork", "Malmo", "Trieste", "Granada", "Utrecht", "Hanoi", "Oaxaca", "Hobart", "Quebec",
)  # fmt: skip
_DISHES = (
    "lentil soup", "mushroom risotto", "tomato tart", "chickpea curry", "potato gratin", "fish stew", "pumpkin bread",
    "vegetable lasagne", "rice pudding", "bean chili", "onion quiche", "noodle salad", "apple crumble", "corn chowder",
    "spinach dumplings", "roast carrots",
)  # fmt: skip
_HERBS = ("thyme", "basil", "coriander", "dill", "parsley", "sage", "mint", "rosemary")
_STAPLES = {
    "buttermilk": "milk with a spoon of lemon juice",
    "an egg": "a spoon of ground flaxseed stirred into water",
    "cream": "oat cream or blended silken tofu",
    "butter": "a mild olive oil, about a fifth less of it",
    "breadcrumbs": "crushed crackers or toasted oats",
    "honey": "maple syrup in the same amount",
    "wine": "stock with a splash of vinegar",
    "cornstarch": "twice the amount of plain flour",
}
_FACTS = {
    "why the sky looks blue": "air scatters short blue waves of sunlight more than long red ones",
    "how a vaccine works": "it shows the body a harmless piece of a germ so that defences are ready in time",
    "why ice floats": "water expands when it freezes, so ice is lighter than the water around it",
    "what a glacier is": "it is a thick mass of old snow, pressed into ice, that slowly flows downhill",
    "how bread rises": "yeast eats sugar and gives off gas, and the stretchy dough traps the bubbles",
    "why leaves turn red": "the green pigment breaks down in autumn and other colours become visible",
    "what inflation means": "prices rise over time, so the same money buys a little less each year",
    "how a battery works": "a chemical reaction pushes electrons through a wire from one pole to the other",
    "why we yawn": "nobody is certain, but it may help to cool the brain and keep us alert",
    "what a prime number is": "it is a number above one that only one and itself divide evenly",
    "how tides form": "the pull of the moon and the sun raises bulges of water that the earth turns through",
    "what a database index does": "it keeps a sorted list of values so that a row is found without reading them all",
    "why cats purr": "muscles in the throat twitch quickly, and the moving air makes the sound",
    "how a rainbow forms": "drops of rain bend sunlight, split its colours and send them back to your eye",
    "what compost is": "it is plant waste that microbes have turned into dark, rich soil",
    "how noise cancelling works": "a microphone hears the noise and the speaker plays its mirror image",
    "what a mortgage is": "it is a loan for a home, and the home itself is the security",
    "why metal feels cold": "metal carries heat away from your hand faster than wood does",
    "how a lock on a canal works": "a chamber fills or empties so that a boat is lifted or lowered between levels",
    "what photosynthesis is": "plants use light to turn water and carbon dioxide into sugar and oxygen",
}
_AUDIENCES = ("a ten year old", "a beginner", "my grandmother", "a new colleague", "a curious teenager")
_TOPICS = (
    "learning to type faster", "keeping houseplants alive", "sleeping better", "growing tomatoes on a balcony",
    "running a first five kilometres", "saving for a holiday", "a calmer morning", "fixing a squeaky door",
    "learning the guitar", "writing a cover letter", "cleaning a keyboard", "packing for a ferry trip",
    "planning a small wedding", "reading more books", "a bike commute in the rain", "a tidy inbox",
)  # fmt: skip
_TIPS = (
    "start with ten minutes a day and keep it easy", "write down what worked and drop the rest",
    "do the hardest part first while you are fresh", "set a fixed time so that you need not decide again",
    "ask a friend to check on you once a week", "change one thing at a time so you can see the effect",
    "make the first step so small that it feels silly", "measure it on paper, not in your head",
    "buy nothing new until you have done it for a month", "take a day off after six days",
)  # fmt: skip
_NOUNS = ("report", "meeting", "invoice", "schedule", "proposal", "draft", "contract", "budget", "agenda", "survey")
_NAMES = ("Ana", "Bram", "Chidi", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kemal", "Lena")


def support(rng: Random) -> Example:
    """A customer's question and an agent's answer."""
    product, fault, day = rng.choice(_PRODUCTS), rng.choice(_FAULTS), rng.choice(_DAYS)
    order, days = rng.randint(10_000, 99_999), rng.choice((14, 30, 60))
    kind = rng.randrange(5)
    if kind == 0:
        return Example(
            f"My {product} {fault}. What can I do?",
            "",
            f"I am sorry that your {product} {fault}. Please send us a photo and your order number, and we will "
            f"{rng.choice(('ship a new one', 'refund you', 'send a spare part'))} within {rng.randint(2, 6)} days.",
        )
    if kind == 1:
        return Example(
            f"Where is my order {order}? It should have arrived on {day}.",
            "",
            f"Thank you for your patience. Order {order} with the {product} left our warehouse and should reach you by "
            f"{rng.choice(_DAYS)}. You can follow the parcel with the link in your email.",
        )
    if kind == 2:
        return Example(
            f"Can I return a {product} that I bought in {rng.choice(_MONTHS)}?",
            "",
            f"Yes, you can return the {product} within {days} days if it is unused. Print the label from your "
            "account, pack it well and drop it at any post office.",
        )
    if kind == 3:
        return Example(
            f"How do I change the delivery address of order {order}?",
            "",
            f"Open your account, choose order {order} and select edit address. This works until the {product} is "
            f"packed, which is usually on {day}.",
        )
    return Example(
        f"I was charged twice for a {product}. Please help.",
        "",
        f"I checked your account and see two charges for the {product}. One of them is a reservation that your "
        f"bank releases in about {rng.randint(2, 7)} days. If it stays, reply to this message and we will fix it.",
    )


def kitchen(rng: Random) -> Example:
    """A cooking question and its answer."""
    dish, herb, minutes = rng.choice(_DISHES), rng.choice(_HERBS), rng.choice((15, 20, 25, 35, 40, 50))
    kind = rng.randrange(4)
    if kind == 0:
        staple, other = rng.choice(sorted(_STAPLES.items()))
        return Example(
            f"What can I use instead of {staple} in {dish}?",
            "",
            f"Use {other}. The {dish} will taste a little different, so add some {herb} and check the seasoning.",
        )
    if kind == 1:
        return Example(
            f"How long does {dish} need for {rng.randint(2, 8)} people?",
            "",
            f"Plan {minutes} minutes for cooking and {rng.randint(5, 20)} for chopping. The {dish} is done when it "
            f"smells sweet and a knife goes in easily.",
        )
    if kind == 2:
        return Example(
            f"Give me a simple recipe for {dish} with {herb}.",
            "",
            f"Warm some oil, soften an onion and stir in the {herb}. Add everything else for the {dish}, cover the pan "
            f"and let it cook for {minutes} minutes. Salt it at the end.",
        )
    return Example(
        f"My {dish} turned out too {rng.choice(('salty', 'dry', 'bland', 'watery', 'sour'))}. How can I save it?",
        "",
        f"Do not throw it away. {rng.choice(('Stir in a cooked potato', 'Add a cup of stock', 'Fold in some yoghurt'))}"
        f", let the {dish} rest for {rng.randint(5, 15)} minutes and finish with fresh {herb}.",
    )


def travel(rng: Random) -> Example:
    """A travel question and its answer; some are about boats and harbours, in a plain voice."""
    city, other = rng.sample(_CITIES, 2)
    month, days = rng.choice(_MONTHS), rng.randint(2, 6)
    kind = rng.randrange(4)
    if kind == 0:
        return Example(
            f"What should I see in {city} in {days} days?",
            "",
            f"Spend the first morning in the old town of {city} and the afternoon at the market. Keep one day for a "
            f"walk {rng.choice(('along the river', 'in the hills', 'by the sea', 'in the gardens'))} and book the "
            "museum in advance.",
        )
    if kind == 1:
        return Example(
            f"How do I get from {city} to {other} in {month}?",
            "",
            f"The easiest way from {city} to {other} is {rng.choice(('the night train', 'a bus', 'a direct train'))}. "
            f"In {month} it is quiet, so a seat bought {rng.randint(2, 9)} days before is cheap enough.",
        )
    if kind == 2:
        return Example(
            f"Is there a boat from {city} to the islands in {month}?",
            "",
            f"Yes, a ferry leaves the harbour of {city} at {rng.randint(6, 11)} in the morning. The crossing takes "
            f"{rng.randint(1, 5)} hours, the captain may cancel it in strong wind, and deck seats cost less.",
        )
    return Example(
        f"What is the weather like in {city} in {month}?",
        "",
        f"{city} in {month} has around {rng.randint(4, 29)} degrees at noon and cool evenings. Pack a light jacket, "
        f"good shoes and something for {rng.choice(('rain', 'wind', 'strong sun'))}.",
    )


def tutor(rng: Random) -> Example:
    """A short exercise with its solution; most have an input."""
    kind = rng.randrange(4)
    name, noun = rng.choice(_NAMES), rng.choice(_NOUNS)
    if kind == 0:
        topic, fact = rng.choice(sorted(_FACTS.items()))
        audience = rng.choice(_AUDIENCES)
        close = rng.choice(("That is the whole idea.", "You can try it at home.", "The details come later."))
        return Example(f"Explain {topic} to {audience}.", "", f"In short, {fact}. {close}")
    if kind == 1:
        price, count = rng.randint(2, 19), rng.randint(3, 12)
        product = rng.choice(_PRODUCTS)
        return Example(
            "Solve the word problem and show the steps.",
            f"{name} sells {count} of one {product} at {price} euros each. How much is that?",
            f"One {product} costs {price} euros and {name} sells {count}. Multiply {price} by {count} to get "
            f"{price * count} euros.",
        )
    if kind == 2:
        return Example(
            "Rewrite the sentence so that it sounds polite.",
            f"{name}, send me the {noun} before {rng.choice(_DAYS)}.",
            f"Hello {name}, could you please send me the {noun} when you have a moment? Thank you very much.",
        )
    return Example(
        "Correct the spelling of the sentence.",
        f"{name} definately recieved the {noun} untill {rng.choice(_DAYS)}.",
        f"{name} definitely received the {noun}. The words definitely, received and until were misspelled.",
    )


def community(rng: Random) -> Example:
    """A forum question and a friendly answer."""
    topic = rng.choice(_TOPICS)
    first, second = rng.sample(_TIPS, 2)
    ask = rng.choice(("Any tips for", "I need help with", "What is your best advice on", "How do you approach"))
    start = rng.choice(("it helped me to", "I would", "my advice is to", "most people here"))
    close = rng.choice(("Good luck!", "Tell us how it goes.", "It gets easier after two weeks.", "Be patient."))
    return Example(
        f"{ask} {topic}{'?' if ask[0] in 'AWH' else '.'}",
        "",
        f"For {topic}, {start} {first}. Then {second}. {close}",
    )


MAKERS: Mapping[str, Maker] = {
    "support": support,
    "kitchen": kitchen,
    "travel": travel,
    "tutor": tutor,
    "community": community,
}
"""Generator of each part of the corpus."""
