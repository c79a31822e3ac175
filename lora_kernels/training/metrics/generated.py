"""Scores of written answers against one reference each."""

from __future__ import annotations

from collections.abc import Sequence

from lora_kernels.errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")


def check_packages() -> None:
    """Raises ModuleNotFoundError where sacrebleu or rouge-score is not installed."""
    import rouge_score  # noqa: F401
    import sacrebleu  # noqa: F401


def tokenizer_for(language: str | None) -> str:
    """sacrebleu's tokenizer: Chinese, Japanese and Korean have no spaces to split at."""
    code = (language or "").lower()[:2]
    return {"zh": "zh", "ja": "char", "ko": "char"}.get(code, "13a")


def generation_scores(
    answers: Sequence[str], references: Sequence[str], language: str | None = None
) -> dict[str, float]:
    """``bleu`` and ``chrf`` over the corpus, ``rouge1``, ``rouge2``, ``rougeL`` as mean F, 0..100.

    BLEU and chrF2 as sacrebleu computes them; ROUGE with rouge-score's own words of a-z and 0-9,
    which exist in no other script: where a reference has none of them, characters are the words.

    Args:
        answers, references: equally many texts.
        language: code of their language, for BLEU's words.
    """
    import sacrebleu

    if len(answers) != len(references):
        raise ConfigError(f"{len(answers)} answers for {len(references)} references")
    bleu = sacrebleu.corpus_bleu(answers, [references], tokenize=tokenizer_for(language))
    chrf = sacrebleu.corpus_chrf(answers, [references])
    return {"bleu": bleu.score, "chrf": chrf.score, **_rouge(answers, references)}


def _rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    latin = RougeScorer(list(ROUGE), use_stemmer=False)
    other = RougeScorer(list(ROUGE), tokenizer=_Characters())
    totals = dict.fromkeys(ROUGE, 0.0)
    for answer, reference in zip(answers, references, strict=True):
        ascii_words = any(c.isascii() and c.isalnum() for c in reference)
        scores = (latin if ascii_words else other).score(reference, answer)
        for name in ROUGE:
            totals[name] += scores[name].fmeasure
    return {name: 100.0 * total / max(1, len(references)) for name, total in totals.items()}


class _Characters:
    def tokenize(self, text: str) -> list[str]:
        return [c for c in text if c.isalnum()]
