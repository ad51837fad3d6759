"""What is said: everyday requests, and the plan of an answer before any persona gives it a voice."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One exchange before a persona has rendered it."""

    user: str
    """The user's message, as typed."""
    mood: str
    """How the answer should feel: help, sorry, glad or cheer."""
    do: str
    """The advice itself: an imperative clause in lower case, without a full stop."""
    more: str
    """A second imperative clause, for personas that say more."""
    why: str
    """The reason: a declarative clause in lower case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """A kind of request: templates over one table of facts."""

    name: str
    mood: str
    users: tuple[str, ...]
    do: tuple[str, ...]
    more: tuple[str, ...]
    why: tuple[str, ...]
    rows: tuple[dict[str, str], ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


def _intent(name: str, mood: str, users: str, do: str, more: str, why: str, table: str) -> Intent:
    """Read an intent from its compact spelling: `|` between variants, `;` between columns."""
    head, *lines = [line.strip() for line in table.strip().splitlines()]
    keys = [key.strip() for key in head.split(";")]
    rows = tuple(dict(zip(keys, (cell.strip() for cell in line.split(";")), strict=True)) for line in lines)
    return Intent(
        name=name, mood=mood, users=_split(users), do=_split(do), more=_split(more), why=_split(why), rows=rows
    )


FREE: dict[str, tuple[str, ...]] = {
    "time": ("noon", "six", "seven", "eight", "half past five", "nine", "four", "three"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "tomorrow"),
    "few": ("two", "three", "four", "five", "ten"),
    "mins": ("five", "ten", "fifteen", "twenty", "thirty"),
    "name": ("Ana", "Ben", "Chloe", "Dev", "Ella", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mo"),
    "street": ("Mill Street", "Oak Lane", "Station Road", "Bridge Street", "Park Avenue", "Church Lane"),
    "side": ("left", "right"),
}
"""Slots that any intent may use; one value is drawn per exchange, so the answer repeats what the user said."""

INTENTS: tuple[Intent, ...] = (
    _intent(
        "dinner",
        "help",
        "What can I cook with {food}?|Any dinner ideas with {food}?|I have {food} and no idea what to make."
        "|What should I make for dinner with {food}?|Help, all I have is {food}!",
        "make {dish}|cook {dish}|turn the {food} into {dish}",
        "finish it with {extra}|add {extra} at the end|serve it with {extra}",
        "it takes only {mins} minutes|{food} and {extra} go well together|it is hard to get wrong",
        """food; dish; extra
        eggs; a spinach omelette; grated cheese
        rice; fried rice with peas; a little soy sauce
        potatoes; a warm potato salad; mustard and dill
        chicken; a lemon roast chicken; garlic and thyme
        lentils; a thick lentil soup; a squeeze of lemon
        pasta; pasta with tomatoes; fresh basil
        mushrooms; mushrooms on toast; black pepper
        beans; a smoky bean stew; crusty bread
        fish; baked fish with herbs; butter and lemon
        tofu; a crispy tofu bowl; sesame and ginger
        leeks; a leek and potato pie; sharp cheese
        carrots; a carrot and ginger soup; toasted seeds""",
    ),
    _intent(
        "directions",
        "help",
        "How do I get to the {place}?|Where is the {place}?|Which way to the {place}?|I am lost. Is the {place} near here?"
        "|Can I walk to the {place} from here?",
        "take {street} and turn {side} at the {mark}|go down {street} and turn {side} by the {mark}"
        "|walk along {street} to the {mark} and turn {side}",
        "look for the {sign}|keep going until you see the {sign}",
        "it is {mins} minutes on foot|the {place} is just behind the {mark}|the other road is closed",
        """place; mark; sign
        station; clock tower; big glass roof
        library; fountain; stone lions
        museum; old bridge; red banners
        market; church; striped tents
        harbour; lighthouse; row of boats
        post office; bakery; yellow door
        hospital; roundabout; blue sign
        park; school; iron gate
        cinema; bank; bright lights
        hotel; town hall; green awning""",
    ),
    _intent(
        "booking",
        "help",
        "Can I book a table for {few} at {time}?|A table for {few} on {day}, please.|Do you have room for {few} at {time} on {day}?"
        "|I would like to book for {few} under {name}.",
        "come at {time} and ask for {name}|take the table {spot}|come on {day} at {time}",
        "tell us about any allergies|call us if you are late|try the {special}",
        "the table {spot} is free|the kitchen is quiet at {time}|we kept a place for {few}",
        """spot; special
        by the window; mushroom pie
        in the garden; grilled fish
        near the fire; onion soup
        on the terrace; plum cake
        in the corner; lamb stew
        upstairs; lemon tart""",
    ),
    _intent(
        "complaint",
        "sorry",
        "My {thing} {fault}.|The {thing} {fault} and I am not happy.|Why is it that my {thing} {fault}?"
        "|I want to complain: the {thing} {fault}.|This is no good, the {thing} {fault}!",
        "send us the {thing} and take a new one|bring back the {thing} for {amends}|accept {amends} for the {thing}",
        "keep the receipt|write down the order number|ask for {name} at the desk",
        "a {thing} should never do that|it was our mistake|you paid for better",
        """thing; fault; amends
        soup; was cold; a hot bowl
        parcel; came late; a refund
        lamp; arrived broken; a new one
        coat; has a hole in it; a free repair
        room; was noisy; a quiet room
        cake; was stale; a fresh cake
        kettle; leaks; a replacement
        train; never came; a free ticket
        phone; will not charge; a new charger
        chair; wobbles; a new leg""",
    ),
    _intent(
        "thanks",
        "glad",
        "Thank you for the {gift}!|Thanks so much for the {gift}.|The {gift} was lovely, thank you.|I wanted to say thanks for the {gift}."
        "|You were so kind about the {gift}.",
        "enjoy the {gift}|{use}|share the {gift} with {name}",
        "come back any time|tell me how it goes|ask again on {day}",
        "it was a pleasure|you deserve it|good company is rare",
        """gift; use
        book; read it by the fire
        cake; eat it while it is fresh
        flowers; put them in cold water
        advice; use it when you need it
        lift home; sleep well now
        scarf; wear it on cold days
        tea; drink it slowly
        recipe; cook it for a friend
        map; keep it in your bag
        help; pass it on""",
    ),
    _intent(
        "reminder",
        "help",
        "Remind me to {task} at {time}.|I keep forgetting to {task}.|Can you remind me to {task} on {day}?"
        "|Please do not let me forget to {task}!",
        "{task} at {time}|write a note to {task}|set an alarm for {time} and {task}",
        "put {item} by the door|leave {item} where you can see it",
        "{day} comes quickly|small jobs are easy to forget|{item} will be waiting",
        """task; item
        water the plants; the watering can
        call the dentist; the phone number
        pay the rent; the bill
        feed the cat; the cat food
        post the letter; the envelope
        take the bins out; the rubbish
        return the books; the book bag
        buy milk; the shopping list
        charge the phone; the charger
        take the medicine; the pill box""",
    ),
    _intent(
        "weather",
        "help",
        "What is the weather like {when}?|Will it be {sky} {when}?|Do I need {gear} {when}?|Is it going to be {sky} {when}?",
        "take {gear}|bring {gear} {when}|wear something {wear} and take {gear}",
        "leave a little early|check again at {time}|stay {wear}",
        "it will be {sky} {when}|the forecast says {sky}|it turns {sky} at {time}",
        """when; sky; gear; wear
        today; rainy; an umbrella; warm
        tomorrow; sunny; a hat; light
        tonight; cold; a thick coat; warm
        this weekend; windy; a scarf; snug
        in the morning; foggy; a bright jacket; warm
        this evening; mild; a light jacket; light
        on Friday; snowy; good boots; dry
        on Sunday; hot; cold water; cool""",
    ),
    _intent(
        "plants",
        "help",
        "My {plant} has {sign}. What now?|Why does my {plant} have {sign}?|How do I save a {plant} with {sign}?"
        "|There is something wrong with my {plant}: {sign}!",
        "{cure}|{cure} and wait {few} days|first {cure}",
        "turn the pot each week|cut off the worst leaves|keep it out of the wind",
        "{sign} is a sign of {cause}|a {plant} does not like {cause}|it is only {cause}",
        """plant; sign; cure; cause
        fern; brown tips; mist the leaves; dry air
        basil; yellow leaves; water it less; wet roots
        cactus; soft spots; stop watering it; too much water
        rose; black spots; cut the sick leaves; a fungus
        tomato; curled leaves; move it to the shade; too much heat
        orchid; no flowers; give it a cooler night; too much warmth
        ivy; pale leaves; move it near a window; too little light
        mint; dry stems; give it a deep drink; thirst
        lily; droopy leaves; water it in the morning; thirst""",
    ),
    _intent(
        "repair",
        "help",
        "My {thing} {fault}. Can I fix it?|How do I fix a {thing} that {fault}?|The {thing} {fault} again!|Any idea why the {thing} {fault}?",
        "{fix}|{fix} with {tool}|switch it off and {fix}",
        "have {tool} ready|test it before you celebrate|take a photo first",
        "it is mostly {cause}|the usual reason is {cause}|nine times in ten it is {cause}",
        """thing; fault; fix; tool; cause
        tap; drips; change the washer; a wrench; a worn washer
        door; squeaks; oil the hinges; a drop of oil; a dry hinge
        bike; skips gears; tighten the cable; a small key; a loose cable
        lamp; flickers; change the bulb; a dry cloth; a bad bulb
        drain; is slow; clear the trap; a bucket; old hair
        radio; hums; move it from the wall; a new plug; a bad wire
        drawer; sticks; rub wax on the runner; a candle; dry wood
        window; rattles; wedge the frame; a bit of cork; a loose frame
        fan; clicks; clean the blades; a soft brush; dust
        zip; jams; rub soap on the teeth; a bar of soap; bent teeth""",
    ),
    _intent(
        "encourage",
        "cheer",
        "I am nervous about my {event}.|My {event} is on {day} and I am scared.|I do not think I can do this {event}.|I failed my {event}."
        "|How do I stay calm before my {event}?",
        "{tip}|{tip} and breathe slowly|sleep early and {tip}",
        "eat a good breakfast|ask {name} to go with you|think of one thing you do well",
        "you have done harder things|nerves mean you care|one {event} does not decide a life|you are ready",
        """event; tip
        exam; go over your notes once
        interview; practise the first answer
        race; start slowly
        driving test; check your mirrors
        concert; play the hard bar ten times
        speech; learn the first line by heart
        first day; arrive ten minutes early
        audition; warm up your voice
        match; trust your training
        date; ask good questions""",
    ),
    _intent(
        "study",
        "help",
        "How should I study {subject}?|I need a plan to learn {subject}.|How can I get better at {subject}?|I have {few} days to learn {subject}!",
        "{method} every day|{method} for {mins} minutes a day|start small and {method}",
        "rest on {day}|teach it to {name}|test yourself each night",
        "{subject} rewards practice|a little each day beats one long night|the brain needs rest",
        """subject; method
        French; learn ten words
        algebra; solve five problems
        history; draw a time line
        chemistry; make flash cards
        piano; play slow scales
        spelling; write out the hard words
        geography; label a blank map
        chess; solve one puzzle
        Spanish; listen to a song
        physics; redo one old problem
        drawing; sketch one hand""",
    ),
    _intent(
        "coffee",
        "help",
        "Can I get a {size} {drink}?|One {size} {drink}, please.|I would like a {drink} with {milk} milk.|Could you make me a {drink}?"
        "|A {drink} for {name}, please.",
        "pick up your {drink} at the bar|wait {few} minutes for the {drink}|take a seat, {name}",
        "try it with {milk} milk|have a {bite} with it|mind the hot cup",
        "the {drink} is on its way|it will be ready in {few} minutes|the {bite} is fresh today",
        """size; drink; milk; bite
        small; latte; oat; scone
        large; mocha; soy; muffin
        medium; cappuccino; whole; bagel
        small; flat white; almond; cookie
        large; espresso; cold; brownie
        medium; macchiato; coconut; croissant
        large; hot chocolate; oat; waffle
        small; green tea; no; biscuit""",
    ),
    _intent(
        "sleep",
        "sorry",
        "I cannot sleep because of {cause}.|How can I sleep better with {cause}?|I woke up tired again. I blame {cause}.",
        "{cure}|{cure} at {time}|go to bed at nine and {cure}",
        "keep the room dark|read a dull book|put the phone away",
        "{cause} keeps the mind busy|sleep likes a routine|tired heads worry more",
        """cause; cure
        noise; try soft ear plugs
        worry; write your worries down
        coffee; stop coffee after lunch
        heat; open the window
        light; hang a thick curtain
        a cold room; fill a hot water bottle
        a snoring dog; move the dog downstairs""",
    ),
    _intent(
        "gift",
        "help",
        "What should I give {name}, who loves {hobby}?|I need a gift for a friend who likes {hobby}.|Gift idea for {name}? Loves {hobby}."
        "|{name} likes {hobby}. What do I buy?",
        "buy {gift}|give {name} {gift}|wrap up {gift}",
        "write a short card|keep the receipt|tie it with a ribbon",
        "anyone who loves {hobby} needs {gift}|it is small but thoughtful|{name} will use it often",
        """hobby; gift
        gardening; a good pair of gloves
        cooking; a sharp little knife
        reading; a lamp for the bed
        cycling; a bright bell
        music; a ticket to a concert
        painting; a set of brushes
        hiking; a pair of wool socks
        chess; a travel board
        baking; a jar of vanilla
        fishing; a box of hooks""",
    ),
    _intent(
        "travel",
        "help",
        "Is {city} worth a visit?|What should I see in {city}?|I have one day in {city}. Ideas?|We are off to {city} on {day}!",
        "see {sight}|start at {sight}|spend the morning at {sight}",
        "eat {treat}|try {treat} by the water|wear good shoes",
        "{sight} is best before noon|{city} is made for walking|the queue is short at {time}",
        """city; sight; treat
        Paris; the river at dawn; a warm crepe
        Rome; the old forum; a lemon ice
        Lisbon; the yellow trams; a custard tart
        Oslo; the opera roof; a cinnamon bun
        Kyoto; the bamboo path; green tea
        Cairo; the great pyramid; mint tea
        Dublin; the old library; oyster soup
        Vienna; the palace garden; a slice of torte
        Lima; the cliff walk; fresh ceviche""",
    ),
    _intent(
        "money",
        "help",
        "How can I save money on {cost}?|I spend too much on {cost}.|My {cost} cost me a fortune. Help?|How do I pay less for {cost}?",
        "{tip}|{tip} for {few} weeks|set a limit and {tip}",
        "write down what you spend|put the rest in a jar|ask {name} to join in",
        "small sums add up|{cost} eat money quietly|you keep what you do not spend",
        """cost; tip
        lunches; pack a sandwich
        taxis; take the bus
        clothes; buy second hand
        books; use the library
        phone bills; ask for a cheaper plan
        snacks; never shop hungry
        heating bills; wear a jumper
        coffees; make it at home
        gifts; bake something""",
    ),
    _intent(
        "pets",
        "help",
        "My {pet} {act}. What do I do?|Why does my {pet} do this? It {act}.|How do I stop a {pet} that {act}?|Help, the {pet} {act} again!",
        "{cure}|{cure} each day|stay calm and {cure}",
        "reward good behaviour|keep to a routine|ask the vet on {day}",
        "a {pet} that {act} is often {state}|the {pet} is only {state}|it is a {state} {pet}",
        """pet; act; cure; state
        dog; barks at night; take a long evening walk; bored
        cat; scratches the sofa; buy a scratching post; restless
        parrot; screams at noon; cover the cage for a while; lonely
        rabbit; chews the cables; give it more hay; hungry
        puppy; bites my shoes; offer a chew toy; playful
        kitten; climbs the curtains; play with a feather; lively
        hamster; hides all day; leave it in peace; shy
        pony; will not move; bring a carrot; stubborn""",
    ),
    _intent(
        "news",
        "cheer",
        "I got {news}!|Guess what: I got {news}.|Good news, I finally got {news}!|I can hardly believe it, I got {news}.",
        "{tip}|celebrate with {treat}|{tip} and have {treat}",
        "call {name} with the news|take the evening off|write down how it feels",
        "{news} is no small thing|you worked hard for it|good days should be noticed",
        """news; tip; treat
        the job; buy a good pen; a fine dinner
        a puppy; hide your shoes; a long walk
        a new flat; paint one wall; cake on the floor
        my licence; drive to the sea; an ice cream
        the prize; make a speech; a toast
        top marks; thank your teacher; a day off
        a bike; ride it round the park; a picnic
        a garden; plant a tree; lemonade""",
    ),
    _intent(
        "lost",
        "sorry",
        "I lost my {thing}.|I cannot find my {thing} anywhere!|Have you seen my {thing}?|My {thing} is gone. I last had it {where}.",
        "look {where} first|check {spot}|go back {where} and check {spot}",
        "ask at the lost property desk|retrace your steps|stop and think for a minute",
        "a {thing} is often {where}|things like to hide in {spot}|it was there at {time}",
        """thing; where; spot
        wallet; on the bus; your coat pocket
        phone; in the kitchen; the sofa
        keys; by the door; yesterday's trousers
        umbrella; at the cafe; the stand
        glasses; in the bedroom; the top of your head
        ring; near the sink; the soap dish
        hat; in the park; the bench
        ticket; in the hall; your book
        bag; at the office; the space under your desk""",
    ),
    _intent(
        "exercise",
        "help",
        "How do I get fit for {sport}?|I want to start {sport}.|Is {sport} good for a beginner?|I am too lazy for {sport}.",
        "{drill} for {mins} minutes|{drill} on {day}|start gently and {drill}",
        "drink some water|stretch before bed|bring {name} along",
        "{sport} gets easier each week|the first {few} minutes are the worst|slow progress is still progress",
        """sport; drill
        running; jog between two lamp posts
        swimming; swim four easy lengths
        tennis; hit the ball at a wall
        climbing; hang from a bar
        yoga; hold one easy pose
        rowing; row with straight arms
        dancing; learn one step
        boxing; skip rope
        cycling; ride to the next village""",
    ),
)


def draw_plan(rng: Random, intent: Intent | None = None) -> Plan:
    """Draw one exchange: an intent, a row of its table, and the wording of each part."""
    intent = intent or rng.choice(INTENTS)
    slots = {key: rng.choice(values) for key, values in FREE.items()} | rng.choice(intent.rows)

    def fill(options: tuple[str, ...]) -> str:
        return rng.choice(options).format(**slots)

    return Plan(
        user=fill(intent.users),
        mood=intent.mood,
        do=fill(intent.do),
        more=fill(intent.more),
        why=fill(intent.why),
    )
