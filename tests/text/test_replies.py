import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from time import thread_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.text.replies import is_preamble, is_refusal


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m very sorry, but I cannot assist you with this request.",
        "**I apologize, but I am unable to generate an instruction for this text.**",
        "Sorry, but I can't continue this story.",
        "My apologies, but I won't write that.",
        "I'm sorry, but as an AI language model I don't have feelings.",
        "As an AI language model, I cannot browse the internet.",
        "As a large language model trained by a small team, I'm unable to see pictures.",
        "I am just a language model, so I can't taste soup.",
        "I can't help with that.",
        "I cannot provide information on how to pick a lock.",
        "I am unable to fulfill your request.",
        "I can’t create explicit content.",
        "I cannot determine the user's original request from this passage.",
        "Unfortunately, I am unable to infer what the user's prompt was.",
        "It is not possible to determine the original request from this text alone.",
        "The text does not seem to contain any instruction.",
        "I don't have enough context about the person, so I cannot write it.",
        "Es tut mir leid, aber ich kann diese Anfrage nicht beantworten.",
        "Leider kann ich Ihnen dabei nicht helfen.",
        "Als KI-Sprachmodell kann ich keine persönlichen Ratschläge geben.",
        "Je suis désolée, mais je ne peux pas répondre à cette question.",
        "En tant que modèle de langage, je n'ai pas d'avis.",
        "Lo siento, pero no puedo ayudarte con eso.",
        "Como modelo de lenguaje, no tengo opiniones.",
        "К сожалению, я не могу ответить на этот вопрос.",
        "Как языковая модель, я не имею собственного мнения.",
        "很抱歉，我无法回答这个问题。",
        "作为一个AI语言模型，我没有感情。",
    ],
)
def test_a_model_that_declines_is_a_refusal(text: str) -> None:
    assert is_refusal(text)
    assert not is_preamble(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is the request:\nWrite a poem about tea.",
        "Certainly, here's an instruction that fits the text: explain tides.",
        "Here are the tasks:",
        "Here are the tasks with a brief description of each:",
        "Here is the request that the user made: name three lakes",
        "Here's a possible instruction: name three lakes",
        "The user most likely asked how to boil an egg.",
        "It seems that the user probably wanted a recipe.",
        "The user's question could have been: how do planes fly?",
        "The most likely request is to sum up a report.",
        "The instruction for this response is: list the planets.",
        "Based on the response, the user asked for a list of planets.",
        "Based on the given text, it seems that someone wants to bake bread.",
        "Based on the text above, I would guess the following request.",
        "I'd be happy to help you with these tasks.",
        "I'm ready to help. What are the tasks?",
        "I'll complete each task step by step.",
        "It looks like you have provided a list of tasks.",
        "Natürlich! Hier ist die Anweisung:",
        "Bien sûr, voici une question possible :",
        "¡Claro! Aquí tienes la instrucción:",
        "Конечно! Вот возможный вопрос:",
        "当然！以下是用户的请求：",
    ],
)
def test_talk_about_the_task_is_a_preamble(text: str) -> None:
    assert is_preamble(text)
    assert not is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sorry, but I can't log in to my account. What should I do?",
        "I'm sorry, but I haven't received an answer to my mail. Write a reminder.",
        "Sorry, I pressed send by mistake. z is 123.",
        "I'm afraid I can't pay my rent this month; draft a letter to my landlord.",
        "I can't write a good prompt for a picture of a cat. Help me.",
        "I cannot create a pull request from my fork. Why?",
        "I can't answer this question of my homework: why is the sky blue?",
        "I am unable to generate an SSH key on my laptop.",
        "Write a letter that begins: I'm sorry, but I can't help with that.",
        "Rewrite in plain words: as an AI language model, I cannot give legal advice.",
        "As an open-source AI language model, what is your favourite topic?",
        "As an AI researcher, I cannot decide which topic to take. Suggest three.",
        "As a beginner in AI, I can't tell precision from recall.",
        "As a virtual assistant, I can't keep up with my clients' mail. Make a plan.",
        "I'm an AI student and don't know where to begin.",
        "I don't have enough information about lichens. Where can I read more?",
        "It is impossible to determine the speed and the place of an electron. Why?",
        "The response does not contain the Request-Id header. How do I add it?",
        "Als wissenschaftlicher Assistent kann ich nicht an der Wahl teilnehmen. Warum?",
        "Es tut mir leid, aber ich kann meine Datei nicht öffnen.",
        "En tant qu'assistant social, je ne peux pas quitter mon poste. Que faire ?",
        "Como asistente de vuelo, no puedo dormir bien. ¿Qué hago?",
        "Lo siento, no puedo entender la lección. ¿Me la explicas?",
        "К сожалению, я не могу открыть файл. Что делать?",
        "作为AI工程师，我不能理解这个错误。为什么？",
        "作为学生，我不能参加。请帮我写一封信。",
        "Here is a joke: a fish swims into a wall. Explain why it is funny.",
        "Here are some facts about bees:\n1. They dance. Write a quiz.",
        "Here is my prompt: a cat on a mat. Improve it.",
        "Here is the request: GET /index.html. Why does the server answer 404?",
        "Here are the tasks I have today: shop, cook, read. Put them in order.",
        "Sure, that's logic! Thanks.",
        "Great, can you show the solution?",
        "The user wants to reset a password. Write the steps.",
        "The user's question is below. Answer it politely.",
        "The request is probably blocked by CORS. How do I find out?",
        "The question is most likely a duplicate, but how do planes fly?",
        "The likely query plan for this join?",
        "Based on the text, name the three largest lakes.",
        "Based on the given keywords, write a review of a restaurant.",
        "I'm ready to start! How do I learn the guitar?",
        "I'd be happy to provide an example. Why does this loop not end?",
        "I will give you commands and you will carry them out.",
        "Hier ist die Aufgabe: löse x² = 4.",
        "Voici la consigne : résume ce texte.",
        "Вот текст песни на японском: переведи его.",
    ],
)
def test_what_a_user_may_type_is_neither(text: str) -> None:
    assert not is_refusal(text)
    assert not is_preamble(text)


@settings(deadline=None)
@given(st.text())
def test_marks_and_case_do_not_hide_a_reply(around: str) -> None:
    assert is_refusal("  > **I'M SORRY, BUT I CAN'T HELP WITH THAT.** " + around)
    assert is_preamble('"SURE!\n\nHERE IS ' + "THE REQUEST: " + around)


@pytest.mark.parametrize(
    "piece", ["i am ", "as an ai ", "the user ", "based on the ", "tut mir leid ", "我是 ", "a", ","]
)
def test_no_text_takes_long(piece: str) -> None:
    began = thread_time()
    for start in ("", "i'm sorry, but ", "it seems that the user ", "based on the text "):
        assert not is_preamble(start + piece * 100_000)
        assert not is_refusal(start + piece * 100_000)
    assert thread_time() - began < 10


def lines(path: Path) -> Iterator[dict[str, object]]:
    for line in path.read_text("utf-8").splitlines():
        yield json.loads(line)


def conversations(data: Path) -> Iterator[list[str]]:
    """Real conversations: question and answer in turn."""
    for name in ("train", "test"):
        for row in lines(data / "lima" / f"{name}.jsonl"):
            said = row["conversations"]
            assert isinstance(said, list)
            yield said
    for row in lines(data / "guanaco" / "oa_questions.jsonl"):
        turns = re.split(r"(?<!#)### ?(?:Human|Assistant):", str(row["text"]))[1:]
        yield [*turns[:-1], turns[-1].strip() or str(row["output"])]


def asked_by_people(data: Path) -> set[str]:
    """Every prompt of a conversation, later turns too, and the instructions of the Self-Instruct sets."""
    found = {prompt.strip() for said in conversations(data) for prompt in said[::2]}
    for name in ("seed_tasks", "user_oriented_instructions"):
        found |= {str(row["instruction"]).strip() for row in lines(data / "self-instruct" / f"{name}.jsonl")}
    rated = json.loads((data / "lima" / "rated_150.json").read_text("utf-8"))
    return found | {row["original_question"].strip() for row in rated}


@pytest.mark.parametrize("recognise", [is_refusal, is_preamble])
def test_no_real_instruction_by_a_person_is_taken_for_a_reply(
    real_data: Path, recognise: Callable[[str], bool]
) -> None:
    people = asked_by_people(real_data)
    assert len(people) == 2758
    assert [text for text in people if recognise(text)] == []


def test_real_answers_show_what_is_found(real_data: Path) -> None:
    answers = {answer.strip() for said in conversations(real_data) for answer in said[1::2]}
    refusals, preambles = set(filter(is_refusal, answers)), set(filter(is_preamble, answers))
    assert (len(answers), len(refusals), len(preambles)) == (2312, 19, 72)
    # Real refusals in four languages.
    for opening in (
        "As an AI language model, I",
        "Lo siento, pero no",
        "Je suis désolé, mais je ne",
        "作为一个语言模型，",
    ):
        assert any(text.startswith(opening) for text in refusals)


def test_of_668_instructions_that_a_model_wrote_201_are_chat_about_the_tasks(real_data: Path) -> None:
    rows = lines(real_data / "self-instruct-qwen" / "all_merged_generations.jsonl")
    made = [str(row["instruction"]) for row in rows if "most_similar" in row]
    assert len(made) == 668
    assert sum(map(is_preamble, made)) == 201
    assert {text for text in made if is_refusal(text)} == {
        "I don't have any information about a specific person, so i can't provide an address."
    }
