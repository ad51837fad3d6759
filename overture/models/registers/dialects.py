"""Word lists and sentence frames of the dialects."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """A way of wording clauses."""

    frames: dict[str, str]
    """Sentence frame for each degree of hedging; `{}` takes an imperative clause."""
    reason: str
    """Frame of the reason; `{}` takes a declarative clause."""
    moods: dict[str, str]
    """A sentence of feeling for each mood: help, sorry, glad, cheer."""
    words: tuple[tuple[str, str], ...] = ()
    """Replacements of whole words or phrases, in order."""

    def speak(self, clause: str) -> str:
        """Replace the dialect's words in a clause."""
        for plain, own in self.words:
            clause = re.sub(rf"\b{plain}\b", own, clause)
        return clause


def _dialect(frames: str, reason: str, moods: str, words: str = "") -> Dialect:
    """Read a dialect from its compact spelling: frames are none|soft|firm, moods are help|sorry|glad|cheer."""
    pairs = tuple((a.strip(), b.strip()) for a, b in (pair.split("=") for pair in words.split(";") if pair.strip()))
    none, soft, firm = (part.strip() for part in frames.split("|"))
    names = ("help", "sorry", "glad", "cheer")
    return Dialect(
        frames={"none": none, "soft": soft, "firm": firm},
        reason=reason,
        moods=dict(zip(names, (part.strip() for part in moods.split("|")), strict=True)),
        words=pairs,
    )


DIALECTS: dict[str, Dialect] = {
    "plain": _dialect(
        "{}|maybe {}|you should definitely {}",
        "because {}",
        "Happy to help|I am sorry to hear that|That is kind of you|I believe in you",
    ),
    "pirate": _dialect(
        "{}|ye might {}|ye must {}, or walk the plank",
        "for {}",
        "A fair question, by the seven seas|Blow me down, that be foul luck|Shiver me timbers, ye be kind|Stand tall, ye old sea dog",
        "you are=ye be;it is=it be;it was=it were;you=ye;your=yer;my=me;friend=matey;money=gold;is=be;are=be;the=th';"
        "food=grub;yes=aye;walk=march;minutes=turns o' the glass;water=grog;and=an'",
    ),
    "bard": _dialect(
        "prithee {}|thou mightst {}|thou must {}, by my troth",
        "for {}",
        "Thy question doth please me|Alas, what cruel fortune|Thy thanks are music to mine ear|Take heart, brave spirit",
        "you are=thou art;you have=thou hast;you will=thou shalt;you do=thou dost;you did=thou didst;you keep=thou keep'st;you paid=thou hast paid;you worked=thou hast toiled;you deserve=thou deserv'st;you=thee;your=thy;"
        "yours=thine;it is='tis;it was='twas;it will='twill;often=oft;before=ere;never=ne'er;minutes=short minutes;"
        "does not=doth not;does=doth;has=hath;evening=eventide;over=o'er;quickly=with haste",
    ),
    "coach": _dialect(
        "{}, let's go|let's try to {}|no excuses, {}",
        "because {}",
        "Great question|Shake it off, we bounce back|That is the spirit|You have got this",
        "small=tiny but mighty;easy=easy-peasy;hard=tough;good=winning;slowly=steady;ready=game ready",
    ),
    "engineer": _dialect(
        "action: {}|suggest: {}|required: {}",
        "reason: {}",
        "Ticket received|Fault confirmed|Feedback logged|Risk is acceptable",
        "minutes=min;and=+;about=approx.;every day=daily;before=prior to",
    ),
    "corporate": _dialect(
        "please {}|we could look to {}|the key action item is to {}",
        "given that {}",
        "Thanks for reaching out|We hear your pain point|We value your feedback|We are fully aligned behind you",
        "use=leverage;help=support;start=kick off;talk=sync;good=best-in-class;ask=reach out to;think=ideate;minutes=business minutes",
    ),
    "scientist": _dialect(
        "the data suggest: {}|one hypothesis is to {}|the evidence is clear, {}",
        "since, on average, {}",
        "An interesting question|A regrettable result|Your gratitude is noted|Your odds are above chance",
        "often=with high probability;small=minor;look=observe;try=test;good=optimal;minutes=minutes (plus or minus one);water=H2O",
    ),
    "folksy": _dialect(
        "just {}|i reckon you could {}|you oughta {}, sure as sunrise",
        "'cause {}",
        "Well, pull up a chair|Aw, shucks, that is a shame|Aw, bless your heart|You will do fine, sugar",
        "it is=it's;isn't=ain't;is not=ain't;nothing=nuthin';something=somethin';going=goin';you are=you're;old=ol';waiting=waitin'",
    ),
    "noir": _dialect(
        "{}, kid|a smart guy might {}|{}, or this city will eat you alive",
        "see, {}",
        "It was a slow night when you walked in|This town breaks everyone's heart|Nobody says thanks in this town|You have got guts, kid",
        "money=dough;man=guy;friend=pal;look=snoop;walk=drift;food=chow;coffee=joe;police=cops;trouble=heat",
    ),
    "texter": _dialect(
        "just {}|maybe {} idk|u gotta {} fr",
        "cuz {}",
        "ok so|omg noooo|aww ty|u got this",
        "you are=ur;you=u;your=ur;are=r;please=pls;tomorrow=tmrw;for=4;before=b4;great=gr8;and=n;with=w;minutes=mins;"
        "tonight=2nite;because=cuz;people=ppl;to=2;it is=its;friend=bestie",
    ),
    "robot": _dialect(
        "execute: {}|suggestion: {}|mandatory: {}",
        "reason: {}",
        "Query accepted|Sympathy module active|Gratitude registered|Morale boost engaged",
        "you=the human;your=the human's;minutes=cycles;sleep=recharge;eat=refuel with;think=compute;friend=unit",
    ),
    "posh": _dialect(
        "do {}|one might {}|one simply must {}",
        "as {}, don't you know",
        "How delightful of you to ask|How perfectly ghastly|You are too kind|Chin up, old thing",
        "you=one;your=one's;good=splendid;bad=beastly;very=frightfully;food=fare;friend=chum;nice=divine",
    ),
    "surfer": _dialect(
        "just {}, dude|maybe {}, like, whenever|totally {}, bro",
        "'cause {}",
        "Whoa, good one|Bummer, man|Stoked, man|You are gonna crush it",
        "good=rad;great=gnarly;it is=it's;friend=brah;you are=you're;water=waves;slowly=mellow;easy=chill",
    ),
    "zen": _dialect(
        "simply {}|if the path allows, {}|without doubt, {}",
        "remember: {}",
        "The question is half the answer|All things pass|Gratitude is a quiet river|The mountain is climbed step by step",
        "quickly=like a swift stream;waiting=still;hard=heavy;easy=light;minutes=breaths",
    ),
    "granny": _dialect(
        "you just {}, pet|why not {}, pet|now you {}, and no arguing",
        "as my mother said, {}",
        "Come and sit down, love|Oh, you poor lamb|Oh, you are a treasure|You are a clever one",
        "cold=chilly;small=wee;children=little ones;friend=sweet friend;hungry=peckish;tired=worn out",
    ),
    "astronaut": _dialect(
        "go for this: {}|advise you {}|priority one: {}",
        "telemetry shows {}",
        "Reading you loud and clear|Copy, that is a bad burn|Thanks received up here|All systems are go",
        "walk=float;go=proceed;look=scan;stop=abort;start=ignite;road=orbit;street=orbit;ready=go for launch",
    ),
}
"""All dialects by name."""
