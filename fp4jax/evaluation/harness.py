"""A model of ours as one that lm-eval (EleutherAI's evaluation harness) can ask. Needs the package `lm-eval`."""

from collections.abc import Sequence

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from fp4jax.evaluation.likelihood import Likelihood, Scorer
from fp4jax.evaluation.subject import Subject
from fp4jax.generation import GREEDY, Generator, Sampling

DEFAULT_MAX_TOKENS = 256
"""Of a generation whose task does not say how many; lm-eval's own default."""


class HarnessModel(TemplateLM):
    """What lm-eval's tasks ask of a model, answered by a `Subject`.

    Texts are tokenized as text, with no special token added; an empty context is the end-of-text token.
    """

    def __init__(self, subject: Subject, *, show_progress: bool = True):
        super().__init__()
        self.subject = subject
        self.scorer = Scorer(subject.frozen, subject.mesh, batch_size=subject.batch_size, max_length=subject.max_length)
        self._show_progress = show_progress
        self._generators: dict[Sampling, Generator] = {}

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self.subject.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.subject.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy decoding gives) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        found = self._scored([(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), likelihood in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(likelihood))
        return [tuple(likelihood) for likelihood in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each whole text, in windows of `max_length` with as much context as there is."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.subject.max_length, context_len=1
            )
            windows += map(utils.make_disjoint_window, rolling)
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, likelihood in zip(owners, self._scored(windows), strict=True):
            totals[owner] += likelihood.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text behind each context up to the first of its stop strings, which is left out.

        Contexts are handled in groups of equal options and of similar length; what is too long loses its beginning.

        Raises:
          ValueError: options that are not understood.
        """
        texts: list[str | None] = [None] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_generation_options(dict(request.args[1])), []).append(number)
        for (stops, max_tokens, sampling), numbers in groups.items():
            prompts = {n: self._prompt(requests[n].args[0], max_tokens) for n in numbers}
            numbers.sort(key=lambda n: -len(prompts[n]))
            for first in range(0, len(numbers), self.subject.batch_size):
                batch = numbers[first : first + self.subject.batch_size]
                found = self._generate([prompts[n] for n in batch], stops, max_tokens, sampling)
                for n, text in zip(batch, found, strict=True):
                    texts[n] = text
                    self.cache_hook.add_partial("generate_until", requests[n].args, text)
        return texts

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        with tqdm(total=len(pairs), desc="scoring", unit="request", disable=not self._show_progress) as bar:
            return self.scorer(pairs, bar.update)

    def _prompt(self, text: str, max_tokens: int) -> list[int]:
        room = self.subject.max_length - max_tokens
        if room < 1:
            raise ValueError(
                f"a generation of {max_tokens} tokens leaves no room for its context: max_length is "
                f"{self.subject.max_length}"
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]

    def _generate(self, prompts, stops: tuple[str, ...], max_tokens: int, sampling: Sampling) -> list[str]:
        subject, decode = self.subject, self.subject.tokenizer.decode
        if sampling not in self._generators:
            self._generators[sampling] = Generator(
                subject.frozen, self.eot_token_id, sampling,
                seed=subject.about["seed"], mesh=subject.mesh, batch_size=subject.batch_size,
            )  # fmt: skip

        def ended(row: int, tokens: list[int]) -> bool:
            return bool(stops) and any(stop in decode(tokens) for stop in stops)

        found = self._generators[sampling](prompts, max_tokens, ended)
        return [_cut(decode(tokens), stops) for tokens in found]


def _generation_options(options: dict) -> tuple[tuple[str, ...], int, Sampling]:
    """(stop strings, most tokens, sampling) of a task's `generation_kwargs`."""
    stops = options.pop("until", ())
    max_tokens = options.pop("max_gen_toks", DEFAULT_MAX_TOKENS)
    # Hugging Face's defaults: greedy unless do_sample, which draws at temperature 1.
    temperature = float(options.pop("temperature", 1.0 if options.get("do_sample") else 0.0))
    sampled = options.pop("do_sample", temperature > 0)
    if sampled and temperature == 0:
        raise ValueError("generation options do_sample=True and temperature=0 contradict each other: leave one out")
    sampling = Sampling(temperature, int(options.pop("top_k", 0)), float(options.pop("top_p", 1.0)))
    if options:
        raise ValueError(
            f"generation options {', '.join(options)} are not known; accepted: until, max_gen_toks, do_sample, "
            "temperature, top_k, top_p"
        )
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    return tuple(stop for stop in stops if stop), int(max_tokens), sampling if sampled else GREEDY


def _cut(text: str, stops: tuple[str, ...]) -> str:
    found = [text.index(stop) for stop in stops if stop in text]
    return text[: min(found, default=len(text))]
