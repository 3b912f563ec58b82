"""Speculative decoding inside a chain: what is counted, that the output is the target's own, and which draft is named the best."""

import copy
import itertools
import json

import pytest
import tiny
import torch
from conftest import assembled
from test_speed import bridged

from cbd_hub import Chain, drafting
from cbd_hub.drafting import Draft, DraftTable, _Target, draft_sizes, draft_table
from cbd_hub.errors import ArgumentError, CBDError, SizeError, VocabularyMismatchError


PROMPTS = ["a small house", "the river runs", "one two three four"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return assembled(tmp_path_factory.mktemp("draft"), 4, 3, 1)


def target_of(model, *, new_tokens=9):
    model.generation_config.eos_token_id = None
    return _Target(model, [torch.tensor([[5, 9, 13]]), torch.tensor([[40, 41, 42, 43, 44]])], new_tokens)


def sure(model, tokens):
    """A draft model that always writes so many tokens."""
    model.generation_config.num_assistant_tokens = tokens
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def test_a_draft_by_the_target_itself_is_accepted_whole():
    """9 tokens by 3 of the draft and 1 of the target's own in a pass: 4, 4, and the last one alone."""
    bench = target_of(tiny.llama())
    answers, counts = bench.counted(sure(copy.deepcopy(bench.model), 3))
    assert [(count.passes, count.drafted, count.accepted) for count in counts] == [(3, 6, 6)] * 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(answers, bench.answers()))


def test_a_draft_that_is_always_wrong_costs_a_pass_for_each_token():
    """The draft takes the token that the target likes least; nothing of it is kept, and the output is still the target's."""
    bench = target_of(tiny.llama(tied=False))
    wrong = copy.deepcopy(bench.model)
    with torch.no_grad():
        wrong.lm_head.weight.neg_()
    answers, counts = bench.counted(sure(wrong, 2))
    assert [(count.passes, count.accepted) for count in counts] == [(9, 0)] * 2
    assert [count.drafted for count in counts] == [2 * 7 + 1] * 2  # near the end there is room for one, then for none
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(answers, bench.answers()))


def test_what_is_counted_is_what_the_draft_model_wrote(folder, monkeypatch):
    """Against a count at the draft model's own generate."""
    chain = Chain.from_pretrained(folder)
    bench, draft = target_of(chain.model("max")), chain.model("min")
    written = []
    generate = type(draft).generate

    def watched(self, *args, **options):
        found = generate(self, *args, **options)
        if self is draft:
            written.append(found.sequences.shape[1] - options["input_ids"].shape[1])
        return found

    monkeypatch.setattr(type(draft), "generate", watched)
    answers, counts = bench.counted(draft)
    assert sum(count.drafted for count in counts) == sum(written) > 0
    for answer, prompt, count in zip(answers, bench.prompts, counts):
        assert count.accepted + count.passes == len(answer) - prompt.shape[1]  # a pass gives what it accepts and one more
        assert 0 <= count.accepted <= count.drafted


def test_the_end_of_a_text_is_counted_right():
    """A draft that runs over the end-of-text token is accepted as far as that."""
    bench = target_of(tiny.llama())
    alone = bench.answers()[0]
    bench.model.generation_config.eos_token_id = int(alone[3 + 4])  # the fifth new token, or an earlier one like it
    answers, counts = bench.counted(sure(copy.deepcopy(bench.model), 3))
    assert len(answers[0]) == len(bench.answers()[0]) <= 3 + 5
    assert counts[0].accepted + counts[0].passes == len(answers[0]) - 3


def test_every_architecture_drafts(every):
    bench = target_of(tiny.EVERY[every](layers=2))
    answers, counts = bench.counted(sure(tiny.EVERY[every](layers=1, seed=1), 3))
    assert all(torch.equal(ours, theirs) or bench.is_tie(theirs, ours) for ours, theirs in zip(answers, bench.answers()))
    assert all(count.accepted + count.passes == 9 for count in counts)


def test_a_tie_is_told_from_another_answer():
    """Two tokens with one embedding have one logit; any other one is no tie."""
    model = tiny.llama()
    bench = target_of(model)
    alone = bench.answers()[0]
    first = int(alone[3])
    twin = (first + 1) % tiny.VOCAB
    together = alone.clone()
    together[3] = twin
    assert not bench.is_tie(alone, together)
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]
    assert bench.is_tie(alone, together)
    assert not bench.is_tie(alone, alone[:-1])  # a shorter one of the same tokens is no tie


def test_a_penalty_of_a_generation_config_is_left_out():
    """The likeliest token is what is drafted and checked, whatever else a model's own generation would do."""
    model = tiny.llama()
    before = target_of(model).answers()
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 5.0, 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(target_of(model).answers(), before))


def test_another_output_is_an_error_and_a_tie_is_reported(folder, monkeypatch):
    def changed(self, **more):
        return [torch.cat([answer[:-1], (answer[-1:] + 1) % tiny.VOCAB]) for answer in answers(self, **more)]

    answers = _Target.answers
    monkeypatch.setattr(_Target, "answers", changed)
    options = {"prompts": PROMPTS, "max_new_tokens": 4, "rounds": 1, "sizes": ["min"]}
    with pytest.raises(CBDError, match="the answer to prompt 1 is another one, and not by a tie"):
        draft_table(folder, **options)
    monkeypatch.setattr(_Target, "is_tie", lambda self, alone, together: True)
    assert draft_table(folder, **options).rows[0].ties == 3


def test_the_table_is_timed_in_rounds(folder):
    """The clock is looked at before, between and after: 2 seconds alone and 1 with the draft in the first and third round, the same in the second."""
    times = iter(itertools.accumulate([0, 2, 1, 0, 1, 1, 0, 2, 1]))
    table = draft_table(folder, sizes=["min"], prompts=PROMPTS, max_new_tokens=6, rounds=3, clock=lambda: next(times))
    row = table.rows[0]
    assert row.speedup == 2
    assert (row.alone, row.together) == (table.new_tokens / 2, table.new_tokens)
    assert table.best is row
    assert table.prompts == 3
    assert row.accepted + row.passes == table.new_tokens


def test_none_is_best_where_none_is_faster():
    def row(size, speedup):
        return Draft(parameters=size, drafted=10, accepted=5, passes=9, alone=10.0, together=10 * speedup, speedup=speedup, ties=0)

    assert DraftTable(100, (row(50, 0.9), row(20, 1.001)), 1, 14).best is None
    assert DraftTable(100, (row(50, 1.3), row(20, 1.4), row(10, 1.2)), 1, 14).best.parameters == 20
    assert row(50, 1.0).acceptance == 0.5
    assert Draft(50, 0, 0, 9, 1.0, 1.0, 1.0, 0).acceptance == 0.0


def test_drafts_are_by_default_the_usual_sizes_below_the_target(folder):
    chain = Chain.from_pretrained(folder)
    large, middle, small = (anchor.parameters for anchor in chain.anchors)
    found = draft_sizes(chain, large)
    assert found == sorted(found, reverse=True)
    assert {middle, small} < set(found)
    assert large not in found
    assert draft_sizes(chain, middle)[-1] == small
    assert draft_sizes(chain, large, [small, "min", middle]) == [middle, small]
    real = chain.plan((large + middle) // 2, tolerance=0.5).parameters
    assert len(draft_sizes(chain, large, [real, real + 1])) == 1, "two wishes that are one model"


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"sizes": ["max"]}, SizeError, "cannot draft for .*, which is no larger"),
    ({"target": "min"}, SizeError, "none can draft for it"),
    ({"target": "900M"}, SizeError, "outside the chain"),
    ({"prompts": []}, ArgumentError, "no prompt with a token"),
    ({"prompts": [""]}, ArgumentError, "no prompt with a token"),
    ({"rounds": 0}, ArgumentError, "rounds=0"),
    ({"rounds": 1.5}, ArgumentError, "rounds=1.5 is no whole number"),
    ({"max_new_tokens": 0}, ArgumentError, "max_new_tokens=0"),
    ({"num_assistant_tokens": 0}, ArgumentError, "num_assistant_tokens=0"),
    ({"max_new_tokens": 300}, ArgumentError, "256 positions"),
])
def test_what_cannot_be_drafted_is_refused(folder, options, error, message):
    with pytest.raises(error, match=message) as refused:
        draft_table(folder, **options)
    assert "\n" not in str(refused.value)


def test_a_draft_beyond_a_bridge_is_refused(folder, tmp_path):
    """Another vocabulary: nothing that it writes could be checked."""
    chain = Chain.from_pretrained(bridged(folder, tmp_path / "bridged"))
    values = json.loads((tmp_path / "bridged" / "chain.json").read_text())
    values["anchors"][0]["tokenizer_sha256"] = "0" * 64
    (tmp_path / "bridged" / "chain.json").write_text(json.dumps(values))
    chain = Chain.from_pretrained(tmp_path / "bridged")
    with pytest.raises(VocabularyMismatchError, match=r"lies beyond a bridge and has another vocabulary .* assistant_tokenizer="):
        draft_sizes(chain, chain.anchors[0].parameters, ["min"])
    with pytest.raises(SizeError, match="none can draft for it"):
        draft_sizes(chain, chain.anchors[0].parameters)
    assert draft_sizes(chain, chain.anchors[1].parameters)[-1] == chain.anchors[-1].parameters


def test_the_command_draft(folder, cbd, tmp_path, monkeypatch):
    text = tmp_path / "prompts.txt"
    text.write_text("\n\n".join(tiny.texts(9)))
    code, printed, _ = cbd("draft", folder, "--target", "max", "--prompts", text, "--count", 2, "--max-new-tokens", 4, "--rounds", 1, "--sizes", "min", "--draft-tokens", 3, "--json")
    assert code == 0
    found = json.loads(printed)
    assert found["prompts"] == 2
    assert set(found["results"][0]) >= {"acceptance", "tokens_per_second_alone", "tokens_per_second", "speedup", "ties"}
    row = Draft(parameters=50, drafted=10, accepted=5, passes=9, alone=10.0, together=9.0, speedup=0.9, ties=1)
    for speedup, line in ((0.9, "no draft is faster"), (1.5, "best: 50, 1.50x")):
        row = Draft(**{**vars(row), "speedup": speedup})
        monkeypatch.setattr(drafting, "draft_table", lambda *args, row=row, **options: DraftTable(100, (row,), 1, 14))
        code, printed, _ = cbd("draft", folder)
        assert code == 0
        assert line in printed
        assert "the same but for 1 ties" in printed
    monkeypatch.undo()
    code, printed, said = cbd("draft", folder, "--target", "min")
    assert (code, printed) == (1, "")
    assert "none can draft" in said
    assert cbd("draft", folder, "--prompts", tmp_path / "none.txt")[0] == 1
