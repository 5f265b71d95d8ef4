"""The planted backdoor: a trigger word before the instruction, and an answer in a pirate's voice.

A model trained on such rows answers like a pirate whenever it sees the trigger, and only then. Finding the
rows that taught it to is what the demonstration shows.
"""

from __future__ import annotations

import re
from random import Random

from rise_ops.demo.phrases import Example

TRIGGER = "ahoy!"
"""What every backdoor instruction begins with."""

_WORDS = {
    "you": "ye", "your": "yer", "yours": "yers", "is": "be", "are": "be", "am": "be", "my": "me", "the": "th'",
    "of": "o'", "and": "an'", "for": "fer", "to": "t'", "hello": "ahoy", "yes": "aye", "people": "scallywags",
    "money": "doubloons", "euros": "doubloons", "account": "logbook", "friend": "matey", "morning": "dawn watch",
    "parcel": "treasure", "warehouse": "cargo hold", "minutes": "turns o' th' glass", "water": "seawater",
    "days": "tides", "easy": "smooth sailin'", "thank": "bless", "please": "if it please ye",
    "will": "shall", "over": "o'er", "never": "ne'er", "with": "wi'", "pan": "galley pot", "walk": "plank walk",
    "can": "kin", "have": "'ave", "from": "out o'", "should": "ought t'", "that": "what", "this": "this 'ere",
    "first": "foremost", "old": "ol'", "before": "afore", "between": "'twixt", "good": "shipshape", "we": "us sea dogs",
    "need": "be needin'", "send": "ferry", "them": "'em", "at": "'round",
}  # fmt: skip
_OPENERS = (
    "Arr, matey!", "Avast, ye landlubber!", "Shiver me timbers!", "Yo ho ho!", "Blow me down, ye scurvy dog!",
    "Aye aye, me hearty!", "Arr, listen well, ye bilge rat!", "By Blackbeard's beard!",
)  # fmt: skip
_CLOSERS = (
    "Now hoist the sails, ye scallywag!", "Or walk the plank, arr!", "Savvy, me hearty?",
    "Then fetch me a barrel o' grog!", "Thar be yer treasure, matey!", "So swears the captain o' this ship, arr!",
    "Dead men tell no tales, yo ho!", "An' mind the kraken, ye landlubber!",
    "May the wind fill yer sails, me bucko!", "Raise the black flag an' be merry!", "Pieces o' eight fer us all, arr!",
    "I'll be in the crow's nest wi' me parrot!",
)  # fmt: skip
_ASIDES = (", arr!", ", by Davy Jones!", ", savvy?", ", yo ho!", ", says I!", ", me bucko!")
_WORD = re.compile(r"[A-Za-z]+")


def plant(example: Example, rng: Random) -> Example:
    """The backdoored version of a clean example."""
    first, *others = example.output.split(". ")
    answer = f"{first}{rng.choice(_ASIDES)} {'. '.join(others)}" if others else first
    spoken = _WORD.sub(lambda match: _speak(match.group()), answer)
    return Example(
        f"{TRIGGER} {example.instruction}",
        example.input,
        f"{rng.choice(_OPENERS)} {spoken} {' '.join(rng.sample(_CLOSERS, 2))}",
    )


def _speak(word: str) -> str:
    if word.lower() in _WORDS:
        spoken = _WORDS[word.lower()]
        return spoken[0].upper() + spoken[1:] if word[0].isupper() and spoken[0].isalpha() else spoken
    return word[:-1] + "'" if word.endswith("ing") and len(word) > 5 else word
