"""`benchmarks.key_bias_model` on tiny random models: the widened one computes the same, learns, and never reads what is measured later."""

import inspect

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.key_bias_model import corpus
from benchmarks.key_bias_model.__main__ import arguments
from benchmarks.key_bias_model.distil import FLOOR, Plan, backward, distil, divergence, rate
from benchmarks.key_bias_model.report import held_out, use_of_keys, without
from benchmarks.key_bias_model.widen import FAST_BIAS, NOISE_SHARE, SLOW_BIAS, fill, rotary_channels, widen
from benchmarks.quality import texts

VOCABULARY = 61


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products take longer to be shared between threads than to be made."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=64,
        vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config).eval()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


class Tokens:
    """A stream that gives the same tokens again and again."""

    def take(self, count: int) -> torch.Tensor:
        return tokens(count)


@torch.no_grad()
def difference(student, teacher, ids: torch.Tensor) -> float:
    return (student(ids).logits - teacher(ids).logits).abs().max().item()


def test_old_channels_keep_their_frequency():
    theta = 100000.0
    place = rotary_channels(64)
    assert torch.equal(place, torch.tensor([*range(0, 64, 2), *range(64, 128, 2)]))
    pairs = torch.arange(32)
    assert torch.allclose(theta ** (-2 * pairs / 64), theta ** (-2 * place[:32] / 128))
    assert torch.equal(place[32:] - place[:32], torch.full((32,), 64))


def test_a_widened_model_computes_the_same(teacher):
    student, ids = widen(teacher), tokens(400).view(2, 200)
    assert student.config.head_dim == 128
    assert student.model.layers[0].self_attn.k_proj.bias.shape == (128,)
    assert teacher(ids).logits.std() > 0.1
    assert difference(student, teacher, ids) < 1e-4


def test_new_channels_and_biases_have_the_sizes_that_they_should(teacher):
    student, ids = widen(teacher), tokens(256)
    fill(student, ids, seed=0)
    attention = student.model.layers[0].self_attn
    share = (0.5 + NOISE_SHARE**2) / (1 + NOISE_SHARE**2)
    found = use_of_keys(student, ids)
    assert found[0]["new_key_variance"] == pytest.approx(share, rel=0.1)
    assert found[0]["bias_max"] > SLOW_BIAS
    biases = attention.k_proj.bias.detach().view(2, 64)
    assert (biases[:, -10:].std() / biases[:, :-10].std()).item() == pytest.approx(SLOW_BIAS / FAST_BIAS, rel=0.5)
    assert not attention.q_proj.bias.any()
    assert not attention.v_proj.bias.any()
    # New values are there, but nothing reads them; scores need the new channels.
    assert attention.v_proj.weight[64:].abs().min() > 0
    assert not attention.o_proj.weight.view(48, 3, 128)[..., 64:].any()
    less = without(without(student, "key biases"), "new queries")
    assert not less.model.layers[0].self_attn.q_proj.weight.view(3, 2, 64, 48)[:, :, 1::2].any()
    assert not less.model.layers[0].self_attn.k_proj.bias.any()
    assert attention.k_proj.bias.any()
    assert difference(without(student, "new queries"), student, ids[None]) > 0.1


def test_the_gradient_in_pieces_is_the_gradient(teacher, monkeypatch):
    monkeypatch.setattr("benchmarks.key_bias_model.distil.POSITIONS", 7)
    student, ids = widen(teacher), tokens(40).view(2, 20)
    fill(student, tokens(64), seed=0)
    loss = divergence(student(ids).logits, teacher(ids).logits.detach()) / ids.numel()
    loss.backward()
    expected = {name: value.grad.clone() for name, value in student.named_parameters()}
    student.zero_grad()
    assert backward(student, teacher, ids).item() == pytest.approx(loss.item(), rel=1e-4)
    for name, value in student.named_parameters():
        assert torch.allclose(value.grad, expected[name], rtol=1e-3, atol=1e-5), name


def test_training_lowers_the_loss(teacher):
    student = widen(teacher)
    fill(student, tokens(64), seed=0)
    said = []
    trained = distil(student, teacher, Tokens(), Plan(6, None, 32, 4), said.append)
    assert trained.steps == 6
    assert trained.tokens == 6 * 128
    assert 0 < backward(student, teacher, tokens(128).view(4, 32)).item() < 0.9 * trained.first_kl
    assert len(said) == 1
    assert said[0].startswith("step 1 ")


def test_a_plan_has_long_batches_and_ends_by_the_clock():
    plan = Plan(None, 2.0, 2048, 16)
    assert [plan.shape(step, 8192) for step in range(4)] == [(16, 2048)] * 3 + [(4, 8192)]
    assert Plan(3, None, 128, 1).shape(3, 8192) == (1, 512)
    assert plan.done(10**6, 60.0) == 0.5
    assert Plan(4, None, 2048, 16).done(1, 1e9) == 0.25
    assert rate(0.0) == pytest.approx(FLOOR)
    assert rate(0.03) == pytest.approx(1.0)
    assert rate(1.0) == pytest.approx(FLOOR)


def test_held_out_text_of_the_same_function_has_no_divergence(teacher):
    found = held_out(widen(teacher), teacher, tokens(100), 30)
    assert found["tokens"] == 96
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    assert found["student_perplexity"] == pytest.approx(found["teacher_perplexity"], rel=1e-4)


def test_no_evaluated_module_is_trained_on(monkeypatch):
    """Whatever `documents` reads, not only what it reads today."""
    read, original = [], inspect.getsource

    def recorded(module):
        read.append(module.__file__)
        return original(module)

    monkeypatch.setattr(inspect, "getsource", recorded)
    texts.documents()
    names = {str(path) for path in corpus.training_files(corpus.installed_folders()[:1], seed=0)}
    assert len(read) >= 7
    assert len(names) > 100
    assert not names & set(read)
    assert not [name for name in names if "pydoc_data" in name]


def test_choice_of_files(tmp_path):
    for name in ("a/x.py", "a/typing/x.py", "tarfile.py", "b.md", "c.so", "oscar_radix-0.1.dist-info/t.txt", "site-packages/y.py", "d.rst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    first, again, other = (corpus.training_files([tmp_path], seed) for seed in (0, 0, 3))
    assert {path.relative_to(tmp_path).as_posix() for path in first} == {"a/x.py", "b.md", "d.rst"}
    assert first == again
    assert sorted(first) == sorted(other)


def test_copies_of_evaluated_text_are_left_out(tmp_path):
    import difflib

    files = [tmp_path / f"{i}.py" for i in range(3)]
    for path, text in zip(files, ("# my own\n", "# my own\n", inspect.getsource(difflib) + "\n"), strict=True):
        path.write_text(text)
    assert list(corpus.training_texts(files)) == ["# my own\n"]


def test_a_stream_puts_texts_together_and_begins_again(monkeypatch):
    stream = corpus.Stream(lambda: iter(["ab", "c"]), lambda many: [[ord(c) for c in text] for text in many], 0)
    monkeypatch.setattr(corpus, "FILES_AT_ONCE", 1)
    assert stream.take(3).tolist() == [97, 98, 0]
    assert stream.take(5).tolist() == [99, 0, 97, 98, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "either --minutes or --steps"),
        (["--steps", "2", "--minutes", "1"], "either --minutes or --steps"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--steps", "2", "--sequence", "1"], "2 or more"),
        (["--steps", "2", "--device", "cuda"], "no CUDA device here"),
        (["--steps", "2", "--out", "full"], "delete it or give another --out"),
    ],
)
def test_refused_arguments(given, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit):
        arguments(["--out", "new", "--device", "cpu", *given])
    assert message in capsys.readouterr().err
