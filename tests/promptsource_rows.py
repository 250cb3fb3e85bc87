"""Rows with the columns of the sets that promptsource's templates are for; their content is made up.

Each entry is a list: some templates only apply to some kinds of rows.
"""

from typing import Any

Row = dict[str, Any]

_PAIR: Row = {"sentence1": "The lake froze early.", "sentence2": "The lake was frozen before December.", "label": 1}
_NLI: Row = {"premise": "The lake froze early.", "hypothesis": "It was cold.", "label": 0}
_TEXT: Row = {"text": "A calm and clever book about tides.", "label": 1}
_HIGHLIGHTS: Row = {
    "passage": "Mira Olsen sailed to Vardo.\n@highlight\nOlsen reached Vardo in June.",
    "query": "The voyage of @placeholder ended in Vardo.",
    "entities": ["Mira Olsen", "Vardo"],
    "answers": ["Mira Olsen"],
}
_TRIALS: Row = {
    "Text": "Sixty patients were given either tea or water. Those with tea slept less. " * 30,
    "Prompts": {
        "Annotations": [{"Annotations": ["Those with tea slept less."], "Label": ["significantly decreased"]}],
        "Comparator": ["water"],
        "Intervention": ["tea"],
        "Outcome": ["hours of sleep"],
    },
}
_DISCOURSE: Row = {
    "coherent_first_sentence": "The bridge, a steel arch, was closed.",
    "coherent_second_sentence": "",
    "incoherent_first_sentence": "The bridge was closed.",
    "incoherent_second_sentence": "The bridge is a steel arch.",
    "discourse_type": "SINGLE_APPOSITION",
}
_CODAH: Row = {
    "question_propmt": "The baker opened the oven and",
    "candidate_answers": ["took out the bread.", "sailed away.", "became a tree.", "read the sea."],
    "correct_answer_idx": 0,
    "question_category": 1,
}
_FACTS: Row = {"question": "What do bees make?", "fact1": "Bees make honey.", "fact2": "Honey is sweet."}
_HOPS: Row = {
    "question": "country_of_origin pale lantern",
    "answer": "norway",
    "candidates": ["norway", "chile", "kenya", "japan"],
    "supports": ["The pale lantern was first built in Bergen.", "Bergen is a town in Norway."],
}
_PLOT: Row = {"title": "The Ferry", "plot": "A pilot saves a ferry.", "question": "Who saves it?"}

ROWS: dict[str, list[Row]] = {
    "ag_news": [_TEXT],
    "anli": [_NLI],
    "banking77": [_TEXT],
    "climate_fever": [
        {
            "claim": "Glaciers are growing.",
            "claim_label": 1,
            "evidences": [{"evidence": f"Evidence {n}.", "evidence_label": n % 3, "article": "Ice"} for n in range(5)],
        }
    ],
    "codah/codah": [_CODAH],
    "codah/fold_3": [_CODAH],
    "common_gen": [{"concepts": ["dog", "park", "run"], "target": "The dog runs in the park."}],
    "conv_ai_2": [
        {
            "user_profile": [["I like snow. "], ["I have two cats. "]],
            "dialog": [
                {"sender_class": "Human", "text": "Hello!", "sender": "a"},
                {"sender_class": "Bot", "text": "Hi, do you like cats?", "sender": "b"},
            ],
        }
    ],
    "cosmos_qa": [
        {
            "context": "Lena missed the bus and walked.",
            "question": "Why did Lena walk?",
            **{f"answer{n}": f"Reason {n}." for n in range(4)},
            "label": 2,
        }
    ],
    "dbpedia_14": [{"title": "Tor", "content": "Tor is a rock formation.", "label": 3}],
    "discofuse/discofuse-wikipedia": [
        _DISCOURSE,
        _DISCOURSE | {"discourse_type": "PAIR_ANAPHORA", "coherent_second_sentence": "It is a steel arch."},
        _DISCOURSE | {"discourse_type": "PAIR_NONE", "coherent_second_sentence": "The bridge is a steel arch."},
    ],
    "duorc/ParaphraseRC": [
        _PLOT | {"no_answer": False, "answers": ["a pilot"]},
        _PLOT | {"no_answer": True, "answers": []},
    ],
    "enriched_web_nlg/en": [
        {
            "lex": {"text": ["Oslo is in Norway."]},
            "modified_triple_sets": {"mtriple_set": [["Oslo | country | Norway"]]},
        }
    ],
    "evidence_infer_treatment/2.0": [_TRIALS],
    "fever/v2.0": [{"claim": "Oslo is a city.", "label": "SUPPORTS"}],
    "gigaword": [{"document": "the ferry was late on monday .", "summary": "ferry late"}],
    "glue/cola": [{"sentence": "The books is here.", "label": 0}],
    "glue/qnli": [{"question": "Where is Oslo?", "sentence": "Oslo is in Norway.", "label": 0}],
    "glue/qqp": [{"question1": "How far is it?", "question2": "What is the distance?", "label": 1}],
    "glue/sst2": [{"sentence": "a warm film", "label": 1}],
    "glue/stsb": [_PAIR | {"label": 3.8}],
    "guardian_authorship/cross_topic_7": [{"article": "On tides.", "author": 3, "topic": 1}],
    "gutenberg_time": [{"hour_reference": 9, "time_phrase": "nine", "tok_context": "It was nine in the morning."}],
    "health_fact": [{"claim": "Tea cures all.", "explanation": "It does not.", "label": 0, "main_text": "A study."}],
    "hotpot_qa/fullwiki": [
        {
            "question": "Where was the founder of Tor born?",
            "answer": "Bergen",
            "type": "bridge",
            "context": {
                "title": ["Tor", "Ola Moe"],
                "sentences": [["Tor was founded by Ola Moe."], ["Ola Moe was born in Bergen."]],
            },
            "supporting_facts": {"title": ["Tor", "Ola Moe"], "sent_id": [0, 0]},
        }
    ],
    "imdb": [_TEXT],
    "mc_taco": [
        {"sentence": "He ate.", "question": "How long?", "answer": "ten minutes", "category": n, "label": n % 2}
        for n in range(5)
    ],
    "movie_rationales": [{"review": "A warm film. I laughed.", "evidences": ["A warm film", "I laughed"], "label": 1}],
    "multi_news": [{"document": "Ferry late.|||||Storm on the coast.", "summary": "– A storm delayed the ferry."}],
    "mwsc": [
        {
            "sentence": "The cup did not fit the box because it was too small.",
            "question": "What was too small?",
            "options": ["cup", "box"],
            "answer": "box",
        }
    ],
    "piqa": [{"goal": "Open a jar.", "sol1": "Twist the lid.", "sol2": "Sing to it.", "label": 0}],
    "qasc": [
        _FACTS
        | {
            "choices": {"text": list("pqrstuvw"), "label": list("ABCDEFGH")},
            "answerKey": "B",
            "combinedfact": "Bees make something sweet.",
        }
    ],
    "rotten_tomatoes": [_TEXT],
    "samsum": [{"dialogue": "A: Late?\nB: Yes.", "summary": "B is late."}],
    "scan/length": [{"commands": "jump twice", "actions": "I_JUMP I_JUMP"}],
    "scan/template_around_right": [{"commands": "walk around right", "actions": "I_TURN_RIGHT I_WALK"}],
    "snips_built_in_intents": [_TEXT],
    "squad": [
        {
            "title": "Oslo",
            "context": "Oslo is in Norway.",
            "question": "Where is Oslo?",
            "answers": {"text": ["in Norway"], "answer_start": [8]},
        }
    ],
    "super_glue/boolq": [{"passage": "Oslo is in Norway.", "question": "is oslo in norway", "label": 1}],
    "super_glue/copa": [
        {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "It sang.", "question": kind, "label": 0}
        for kind in ("effect", "cause")
    ],
    "super_glue/multirc": [{"paragraph": "Oslo.", "question": "Where?", "answer": "Here.", "label": 1}],
    "super_glue/record": [_HIGHLIGHTS],
    "super_glue/wic": [_PAIR | {"word": "lake"}],
    "super_glue/wsc.fixed": [
        {"text": "Ann told Eva that she won.", "span1_text": "Ann", "span2_text": "she", "span2_index": 4, "label": 1}
    ],
    "trec": [{"text": "Who built it?", "coarse_label": n, "fine_label": 10 * n} for n in range(6)]
    + [{"text": "Where is it?", "coarse_label": n, "fine_label": fine} for n in range(6) for fine in range(50)],
    "tweet_eval/stance_abortion": [_TEXT],
    "tweet_eval/stance_hillary": [_TEXT],
    "wiki_hop/masked": [
        _HOPS
        | {"question": f"{kind} pale lantern", "answer": "___MASK1___", "candidates": ["___MASK1___", "___MASK2___"]}
        for kind in ("country_of_origin", "place_of_birth")
    ],
    "wiki_hop/original": [_HOPS],
    "wino_bias/type2_pro": [
        {
            "tokens": ["The", "clerk", "called", "the", "guard", "because", "he", "was", "late", "."],
            "coreference_clusters": ["3", "4", "6", "6"],
        }
    ],
    "xsum": [{"document": "The ferry was late.", "summary": "Ferry late."}],
    "yahoo_answers_topics": [
        {"topic": 2, "question_title": "Why?", "question_content": "Why is it so?", "best_answer": "Because."}
    ],
}
for _name in ("ax", "mnli", "mnli_matched", "mnli_mismatched"):
    ROWS[f"glue/{_name}"] = [_NLI]
for _name in ("mrpc", "rte", "wnli"):
    ROWS[f"glue/{_name}"] = [_PAIR]
for _name in ("axb",):
    ROWS[f"super_glue/{_name}"] = [_PAIR]
for _name in ("axg", "cb", "rte"):
    ROWS[f"super_glue/{_name}"] = [_NLI]
for _name in ("labeled_final", "labeled_swap", "unlabeled_final"):
    ROWS[f"paws/{_name}"] = [_PAIR]
