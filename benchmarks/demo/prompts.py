"""Text of the workload: two shared system prompts with tool descriptions, and what the agents' users say."""

import random
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"

ROWS = 4
"""Rows of the raw tool output that ends every user message; tool output is most of what an agent reads."""

_TRAVEL_TURNS = [
    (
        "I have to be in {town} on 2031-05-{day} for a meeting at {hour}:00, and I start from {origin}. I would like to arrive one "
        "hour before it. What do you need to know from me, and which tool comes first?"
    ),
    (
        "RESULT search_trains: {train}1 departs 06:12 arrives {early}:04, 1 change, price {price}; {train}4 departs 07:38 arrives "
        "{early}:51, direct, price {price2}; {train}9 departs 09:15 arrives {hour}:40, direct, price {price3}. Which of these three "
        "trains do you advise, and why?"
    ),
    (
        "Take the direct one. My name is {name}. RESULT book_seat: code {code}, held until 18:20, coach 7, seat 41, window. I stay for "
        "two nights, close to {landmark}, below {limit} for one night, and I need breakfast. What now?"
    ),
    (
        "RESULT find_hotel: Hotel {hotel}, 350 m, {price2} a night, rating 8.4, free cancellation; Pension Linde, 900 m, {price} a "
        "night, rating 7.9, no cancellation; {landmark} Suites, 80 m, {price3} a night, rating 9.1. RESULT expense_check: limit "
        "{limit}. Choose one and give the reason in numbers."
    ),
    (
        "Good. On the second evening I would like to eat with {guests} people, {kitchen} kitchen, not far from {landmark}, and the "
        "weather forecast says 70 % rain from 19:00. Sum up the whole plan so far: train, seat, hotel and dinner, in the order of the "
        "days."
    ),
]

_CLUSTER_TURNS = [
    (
        "Since {hour}:20 the users of cluster {cluster} say that uploads are slow. I have changed nothing since 2031-05-{day}. Where "
        "do you look first, and what would the tool have to show to confirm it?"
    ),
    (
        "RESULT list_hosts: {host}-1 storage ready image 41 up {day} days; {host}-2 storage ready image 41 up {day} days; {host}-3 "
        "storage degraded image 40 up {limit} days; {host}-4 gateway ready image 41 up 3 days. Which host do you suspect and which "
        "metric do you want next?"
    ),
    (
        "RESULT metrics {host}-3 latency, 60 minutes: lowest 4 ms, highest {limit}0 ms, mean {price} ms, rising since {hour}:10. "
        "RESULT metrics {host}-3 disk: 71 % used. RESULT metrics {host}-1 latency: mean 6 ms. What follows from these numbers, and "
        "what do you check before you touch anything?"
    ),
    (
        "RESULT logs {service}: {hour}:31 {host}-3 slow write on slot {slot}, {price2} ms; {hour}:33 {host}-3 reallocated sector count "
        "{guests}2 on slot {slot}; {hour}:36 {host}-3 retry of block {code}. May we restart {service} now, or is there another step "
        "that has to come first?"
    ),
    (
        "RESULT drain {host}-3: drained after 6 minutes. RESULT replace_disk: ticket {code}, rebuild expected to take {early} hours. "
        "Write the summary for the team of {name}: what was broken, since when, the evidence with its numbers, what was done, and what "
        "remains to be done."
    ),
]

_AGENTS = [
    {
        "town": "Basel", "origin": "Lyon Part-Dieu", "day": "14", "hour": "13", "early": "11", "train": "TG92",
        "price": "64", "price2": "89", "price3": "102", "name": "Mira Okafor", "code": "KXRTQB", "landmark": "Mittlere Bridge",
        "limit": "130", "hotel": "Wettstein", "guests": "3", "kitchen": "Alsatian",
    },
    {
        "cluster": "amber", "host": "amb", "day": "12", "hour": "09", "limit": "188", "price": "240",
        "service": "blockd", "slot": "5", "price2": "910", "guests": "3", "code": "T40817", "early": "11",
        "name": "Jonas Lind",
    },
    {
        "town": "Ghent", "origin": "Köln Hauptbahnhof", "day": "20", "hour": "15", "early": "12", "train": "EC17",
        "price": "51", "price2": "73", "price3": "95", "name": "Tomás Rey", "code": "PLMZWA", "landmark": "Graslei",
        "limit": "118", "hotel": "Koornmarkt", "guests": "5", "kitchen": "Flemish",
    },
    {
        "cluster": "cobalt", "host": "cob", "day": "27", "hour": "16", "limit": "95", "price": "178",
        "service": "chunkstore", "slot": "11", "price2": "640", "guests": "4", "code": "T41933", "early": "7",
        "name": "Aiko Brandt",
    },
    {
        "town": "Trieste", "origin": "Wien Hauptbahnhof", "day": "08", "hour": "17", "early": "15", "train": "RJ13",
        "price": "58", "price2": "84", "price3": "99", "name": "Lena Duarte", "code": "GHVNDE", "landmark": "Canal Grande",
        "limit": "125", "hotel": "Miramare", "guests": "2", "kitchen": "seafood",
    },
    {
        "cluster": "garnet", "host": "gar", "day": "03", "hour": "22", "limit": "210", "price": "312",
        "service": "objectd", "slot": "2", "price2": "1250", "guests": "6", "code": "T42290", "early": "14",
        "name": "Sam Petrov",
    },
]

AGENTS = len(_AGENTS)
"""Conversations of the workload; agent i works under system prompt i mod 2."""

TURNS = len(_TRAVEL_TURNS)


def system_prompt(agent: int) -> str:
    """The system prompt of `agent`, 1,000 to 1,500 tokens with SmolLM2's tokenizer."""
    return (TEXTS / ("cluster.txt" if agent % 2 else "travel.txt")).read_text(encoding="utf-8")


def user_turns(agent: int) -> list[str]:
    """What the user of `agent` says, turn by turn, each with a table of raw tool output."""
    turns = _CLUSTER_TURNS if agent % 2 else _TRAVEL_TURNS
    return [f"{text.format(**_AGENTS[agent])}\n{_raw_output(agent, turn)}" for turn, text in enumerate(turns)]


def _raw_output(agent: int, turn: int) -> str:
    """ROWS lines that differ between agents and turns, and are the same in every run."""
    draw = random.Random(1000 * agent + turn)
    rows = _cluster_row if agent % 2 else _travel_row
    return "RAW OUTPUT\n" + "\n".join(rows(draw, _AGENTS[agent], minute) for minute in sorted(draw.sample(range(60), ROWS)))


def _travel_row(draw: random.Random, agent: dict, minute: int) -> str:
    stop = draw.choice(["Mulhouse", "Luxembourg", "Salzburg", "Udine", "Liège", "Villach", "Bern", "Olten", "Aachen", "Graz"])
    note = draw.choice(["bicycles allowed", "restaurant car", "quiet coach", "replacement bus", "change of platform"])
    return f"{draw.randint(6, 21):02}:{minute:02} {agent['train']}{draw.randint(10, 99)} via {stop}, platform {draw.randint(1, 16)}, {note}"


def _cluster_row(draw: random.Random, agent: dict, minute: int) -> str:
    event = draw.choice(["write finished", "queue is long", "checksum repaired", "heartbeat late", "snapshot kept", "retry scheduled"])
    where = f"{agent['host']}-{draw.randint(1, 4)} {agent['service']}"
    return f"{agent['hour']}:{minute:02} {where}: {event}, slot {draw.randint(0, 11)}, {draw.randint(2, 999)} ms"
