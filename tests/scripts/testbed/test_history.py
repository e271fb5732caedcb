from scripts.testbed import history

LOG = [
    {"step": 1, "loss": 9.0, "loss_token": 2.0, "seconds": 10.0, "num_tokens": 100, "learning_rate": 0.1},
    {"step": 2, "loss": 8.0, "loss_token": 1.0, "seconds": 11.0, "num_tokens": 300, "learning_rate": 0.2},
    {"step": 2, "eval_loss": 7.0},
    {"step": 3, "loss": 6.0, "loss_token": 0.5, "seconds": 99.0, "num_tokens": 400, "learning_rate": 0.1},
    {"step": 4, "loss": 5.0, "loss_token": 0.4, "seconds": 101.0, "num_tokens": 800, "learning_rate": 0.0},
    {"step": 4, "eval_loss": 7.5},
]


def test_speed_leaves_validation_out_and_seconds_keep_it_in() -> None:
    curves = history.read(LOG)
    assert curves.seconds == 101.0
    assert curves.tokens_per_s == 200.0
    assert curves.points["eval_loss"] == ((2, 4), (7.0, 7.5))


def test_figures_have_stable_names() -> None:
    curves = history.read(LOG)
    assert history.summary(curves) == {
        "train_seconds": 101.0, "tokens_per_s": 200.0, "final_loss": 5.0, "final_valid_loss": 7.5,
    }  # fmt: skip
    assert {row.metric: row.value for row in history.rows(curves, "moe")}["best_valid_loss"] == 7.0


def test_the_page_shows_loss_rate_and_terms() -> None:
    (section,) = history.sections(history.read(LOG))
    assert len(section.plots) == 3
    assert all(plot.startswith("<svg") for plot in section.plots)


def test_the_page_shows_what_omoe_takes_out_and_leaves() -> None:
    logged = [
        {**entry, "omoe_removed_energy": 0.1, "omoe_leftover": 0.5} if "loss" in entry else entry for entry in LOG
    ]
    (section,) = history.sections(history.read(logged))
    assert len(section.plots) == 4
    assert "leftover" in section.plots[3]


def test_nothing_logged_is_nothing_shown() -> None:
    curves = history.read([])
    assert history.summary(curves) == {"train_seconds": 0.0, "tokens_per_s": 0.0}
    assert history.sections(curves)[0].plots == ()
