"""What fine-tuning is judged by, and its report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from penalties_jax.recipes import plots
from penalties_jax.recipes.report import Report, Table
from penalties_jax.recipes.text import Corpus, unigram_loss

IMAGES = ADAPTATION, CURVES = "adaptation.png", "curves.png"


class Result(NamedTuple):
    """What fine-tuning with one KL weight or budget did, on held-out text.

    In nats per byte or token.

    Attributes:
        kl_weight: The weight of KL(model || base model); of a budget, what it has come to.
        target_before: The loss of the base model on the target text.
        target_after: The loss of the fine-tuned model there.
        base_before: The loss of the base model on the base text.
        base_after: The loss of the fine-tuned model there; its increase is the forgetting.
        kl: KL(fine-tuned model || base model) on the base text.
        kl_budget: The limit of that KL, if there is one.
    """

    kl_weight: float
    target_before: float
    target_after: float
    base_before: float
    base_after: float
    kl: float
    kl_budget: float | None = None


class Written(NamedTuple):
    """What a prompt is followed by: as the base model writes it, and as each member does."""

    prompt: str
    before: str
    after: Sequence[str]


def report(
    results: Sequence[Result],
    records: Sequence[Mapping[str, Any]],
    base_text: Corpus,
    written: Sequence[Written] = (),
) -> Report:
    """Return the report of the results, of the training records of the log, and of texts."""
    unit = f"nats per {base_text.unit}"
    budgets = results[0].kl_budget is not None
    by, member = ("kl_budget", "KL budget") if budgets else ("kl_weight", "KL weight")
    in_order = sorted(results, key=lambda result: getattr(result, by))
    # Of the small model the base text is what it has learnt; of others it is one text of many.
    distance = {
        "byte": (
            "forgetting: rise of the loss on the base text",
            [r.base_after - r.base_before for r in in_order],
        ),
        "token": ("KL to the base model on the base text", [r.kl for r in in_order]),
    }
    moved, distances = distance[base_text.unit]
    adaptation = plots.frontier(
        distances,
        [result.target_before - result.target_after for result in in_order],
        labels=[f"{member} {getattr(result, by):g}" for result in in_order],
        axes=(
            f"{moved}, {unit}",
            f"adaptation: fall of the loss on the target text, {unit}",
        ),
    )
    of_budgets = {
        "kl/held_out": "KL to the base model on held-out base text, and its budget",
        "kl/weight": "KL weight",
    }
    of_gradients = {
        "gradient/kl/weighted": "norm of the gradient of the weighted KL, in the logits"
    }
    curves = plots.curves(
        records,
        panels={
            "loss": f"loss on the target text, {unit}",
            "kl": f"KL to the base model, {unit}",
            **(of_budgets if budgets else {}),
            **(of_gradients if "gradient/kl/weighted" in records[0] else {}),
        },
        by=by,
        legend=member,
        limited="kl/held_out",
    )
    names = ("target before", "target after", "base before", "base after", "KL to base")
    headers = (member, *(["KL weight"] if budgets else []), *names)
    rows = [
        [f"{getattr(result, by):g}", *(f"{value:.4f}" for value in result[not budgets : 6])]
        for result in results
    ]
    last = [record for record in records if record["step"] == records[-1]["step"]]
    norms = [name for name in last[0] if name.startswith("gradient/")]
    norm_rows = [[f"{r[by]:g}", *(f"{r[name]:.3g}" for name in norms)] for r in last]
    norm_table = ((member, *(name.removeprefix("gradient/") for name in norms)), norm_rows)
    return Report(
        template="finetune/report.html.jinja",
        table=(headers, rows),
        units=f"losses and KL in {unit}, on held-out text",
        images={ADAPTATION: adaptation, CURVES: curves},
        values={
            "unit": base_text.unit,
            "unigram": unigram_loss(base_text),
            "norms": norm_table if norms else None,
            "written": [(each.prompt, _in_rows(each, results, by, member)) for each in written],
        },
    )


def _in_rows(written: Written, results: Sequence[Result], by: str, member: str) -> Table:
    """Return a table of what the base model and every member write after a prompt."""
    labels = ["before", *(f"{member} {getattr(result, by):g}" for result in results)]
    texts = written.before, *written.after
    return ("", "writes"), list(zip(labels, texts, strict=True))
