import choix
import evalica
import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from counterproof.errors import UserError
from counterproof.judging.battles import Battles, count_battles
from counterproof.judging.bradley_terry import BradleyTerry


def table(first, second, outcome, count=None, weight=None, prompt=None, style=None, models=None):
    first, second = np.asarray(first), np.asarray(second)
    size = int(max(first.max(), second.max())) + 1 if models is None else models
    ones = np.ones(len(first))
    return Battles(
        models=tuple(f"m{n:02d}" for n in range(size)),
        first=first,
        second=second,
        outcome=np.asarray(outcome, float),
        count=ones if count is None else np.asarray(count, float),
        weight=ones if weight is None else np.asarray(weight, float),
        prompt=None if prompt is None else np.asarray(prompt),
        style=style,
        style_names=() if style is None else tuple(f"style_{n}" for n in range(style.shape[1])),
    )


def simulated(models=8, battles=4000, ties=False, seed=0, prompts=None):
    rng = np.random.default_rng(seed)
    ability = rng.normal(size=models)
    a = rng.integers(models, size=battles)
    b = (a + rng.integers(1, models, size=battles)) % models
    first, second = np.minimum(a, b), np.maximum(a, b)
    outcome = (rng.random(battles) < expit(ability[first] - ability[second])).astype(float)
    if ties:
        outcome[rng.random(battles) < 0.2] = 0.5
    prompt = None if prompts is None else rng.integers(prompts, size=battles)
    return table(first, second, outcome, prompt=prompt, models=models), ability - ability.mean()


def wins(battles):
    matrix = np.zeros((len(battles.models),) * 2)
    each = battles.count * battles.weight
    np.add.at(matrix, (battles.first, battles.second), each * battles.outcome)
    np.add.at(matrix, (battles.second, battles.first), each * (1 - battles.outcome))
    return matrix


def test_two_models_have_the_log_of_their_odds():
    battles = table([0, 0, 0], [1, 1, 1], [1, 0, 0.5], count=[7, 2, 3])
    fit = BradleyTerry().fit(battles)
    assert fit.ratings_[0] - fit.ratings_[1] == pytest.approx(np.log(8.5 / 3.5), abs=1e-9)
    dropped = BradleyTerry(ties="drop").fit(battles)
    assert dropped.ratings_[0] - dropped.ratings_[1] == pytest.approx(np.log(7 / 2), abs=1e-9)
    assert fit.win_probability()[0, 1] == pytest.approx(8.5 / 12)


@pytest.mark.parametrize("ties", [False, True])
def test_ratings_are_those_of_three_other_implementations(ties):
    battles, _ = simulated(ties=ties)
    ours = BradleyTerry().fit(battles).ratings_
    theirs = choix.ilsr_pairwise_dense(wins(battles), tol=1e-12)
    np.testing.assert_allclose(ours, theirs - theirs.mean(), atol=1e-6)
    winner = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    names = np.array(battles.models)
    outcomes = [winner[y] for y in battles.outcome]
    found = evalica.bradley_terry(
        names[battles.first], names[battles.second], outcomes, tie_weight=0.5, tolerance=1e-12, limit=10_000
    )
    logs = np.log(found.scores.loc[list(battles.models)].to_numpy())
    np.testing.assert_allclose(ours, logs - logs.mean(), atol=1e-6)
    design = np.zeros((len(battles.first), len(names)))
    design[np.arange(len(design)), battles.first] = 1
    design[np.arange(len(design)), battles.second] = -1
    both = np.concatenate([np.ones(len(design)), np.zeros(len(design))])
    logistic = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(
        np.concatenate([design, design]), both, np.concatenate([battles.outcome, 1 - battles.outcome])
    )
    coef = logistic.coef_[0]
    np.testing.assert_allclose(ours, coef - coef.mean(), atol=1e-4)


def test_weights_are_repetitions_and_rows_may_come_in_any_order():
    battles, _ = simulated(battles=300)
    order = np.random.default_rng(0).permutation(300)
    doubled = table(
        battles.first[order], battles.second[order], battles.outcome[order], weight=np.full(300, 2.0), models=8
    )
    np.testing.assert_allclose(BradleyTerry().fit(doubled).ratings_, BradleyTerry().fit(battles).ratings_, atol=1e-9)
    rows = [
        {"model_a": f"m{i:02d}", "model_b": f"m{j:02d}", "winner": "model_a" if y else "model_b"}
        for i, j, y in zip(battles.first, battles.second, battles.outcome, strict=True)
    ]
    swapped = [
        {**row, "model_a": row["model_b"], "model_b": row["model_a"],
         "winner": {"model_a": "model_b", "model_b": "model_a"}[row["winner"]]}
        for row in rows
    ]  # fmt: skip
    for records in (rows, swapped):
        np.testing.assert_allclose(
            BradleyTerry().fit(count_battles(records)).ratings_, BradleyTerry().fit(battles).ratings_, atol=1e-9
        )


def test_a_prior_is_the_ridge_of_the_logistic_regression():
    battles, _ = simulated(battles=200)
    fit = BradleyTerry(l2=2.0).fit(battles)
    chance = expit(fit.ratings_[battles.first] - fit.ratings_[battles.second])
    gradient = np.zeros(8)
    np.add.at(gradient, battles.first, chance - battles.outcome)
    np.add.at(gradient, battles.second, battles.outcome - chance)
    np.testing.assert_allclose(gradient + 2.0 * fit.ratings_, 0, atol=1e-7)
    assert np.ptp(fit.ratings_) < np.ptp(BradleyTerry().fit(battles).ratings_)


@pytest.mark.parametrize("unit", ["battle", "prompt"])
def test_a_replicate_is_the_fit_of_its_counts(unit, monkeypatch):
    """Chord iterations against Newton's method on each draw alone, the draws being the same."""
    battles, _ = simulated(models=6, battles=900, ties=True, prompts=40, seed=3)
    model = BradleyTerry().fit(battles)
    drawn = []
    draws = model._draws

    def recording(*given):
        draw = draws(*given)
        return lambda rounds: drawn.append(draw(rounds)) or drawn[-1]

    monkeypatch.setattr(model, "_draws", recording)
    replicates = model.bootstrap(30, unit=unit, seed=1)
    counts = np.concatenate(drawn)
    assert counts.shape == (30, 900)
    if unit == "battle":
        np.testing.assert_allclose(counts.sum(axis=1), 900)
    else:
        for prompt in range(40):
            assert (np.ptp(counts[:, battles.prompt == prompt], axis=1) == 0).all()
    for replicate, count in zip(replicates, counts, strict=True):
        alone = BradleyTerry().fit(table(battles.first, battles.second, battles.outcome, count=count))
        np.testing.assert_allclose(replicate, alone.ratings_, atol=1e-6)


def test_bootstrap_sandwich_and_information_agree_where_the_model_is_true():
    battles, _ = simulated(models=10, battles=20_000, seed=5)
    model = BradleyTerry().fit(battles)
    spread = model.bootstrap(1500, seed=0).std(axis=0)
    sandwich = np.sqrt(np.diag(model.covariance()))
    np.testing.assert_allclose(spread / sandwich, 1, atol=0.08)
    chance = expit(model.ratings_[battles.first] - model.ratings_[battles.second])
    information = np.zeros((10, 10))
    for i, j, v in zip(battles.first, battles.second, chance * (1 - chance), strict=True):
        information[[i, j], [i, j]] += v
        information[[i, j], [j, i]] -= v
    np.testing.assert_allclose(sandwich / np.sqrt(np.diag(np.linalg.inv(information + 0.1)) - 0.1), 1, atol=0.03)


def test_battles_that_go_together_widen_the_intervals():
    """Every battle three times on the same prompt: the information of one, so sqrt(3) of the naive width."""
    battles, _ = simulated(models=5, battles=2000)
    thrice = [np.repeat(part, 3) for part in (battles.first, battles.second, battles.outcome)]
    tripled = table(*thrice, prompt=np.repeat(np.arange(2000), 3))
    model = BradleyTerry().fit(tripled)
    once = BradleyTerry().fit(battles)
    np.testing.assert_allclose(model.ratings_, once.ratings_, atol=1e-8)
    np.testing.assert_allclose(model.covariance(unit="prompt"), once.covariance(), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(model.covariance(unit="battle") * 3, once.covariance(), rtol=1e-6, atol=1e-12)
    ratio = model.bootstrap(400, unit="prompt").std(axis=0) / model.bootstrap(400, unit="battle").std(axis=0)
    np.testing.assert_allclose(ratio, np.sqrt(3), rtol=0.15)
    assert model.unit() == "prompt"
    assert once.unit() == "battle"


def test_intervals_cover_the_truth():
    held = []
    for seed in range(40):
        battles, truth = simulated(models=6, battles=1200, seed=100 + seed)
        low, high = np.quantile(BradleyTerry().fit(battles).bootstrap(300, seed=seed), [0.025, 0.975], axis=0)
        held.append((low < truth) & (truth < high))
    assert 0.90 < np.mean(held) < 0.99  # 240 intervals: .95 +- .014


def test_style_is_taken_out():
    """A judge that likes long answers: with style control, ratings are those of equal length."""
    rng = np.random.default_rng(0)
    models, size = 5, 30_000
    ability, habit = rng.normal(size=models), rng.normal(size=models)
    a = rng.integers(models, size=size)
    b = (a + rng.integers(1, models, size=size)) % models
    first, second = np.minimum(a, b), np.maximum(a, b)
    style = np.column_stack([habit[first] - habit[second] + rng.normal(size=size), rng.normal(size=size)])
    outcome = (rng.random(size) < expit(ability[first] - ability[second] + 0.8 * style[:, 0])).astype(float)
    battles = table(first, second, outcome, style=style)
    fit = BradleyTerry(style=True).fit(battles)
    np.testing.assert_allclose(fit.ratings_, ability - ability.mean(), atol=0.1)
    assert fit.style_[0] == pytest.approx(0.8 * style[:, 0].std(), abs=0.05)
    assert abs(fit.style_[1]) < 0.05
    assert np.abs(BradleyTerry().fit(battles).ratings_ - (ability - ability.mean())).max() > 0.3
    design = np.zeros((size, models + 2))
    design[np.arange(size), first], design[np.arange(size), second] = 1, -1
    design[:, models:] = style / style.std(axis=0)
    coef = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(design, outcome).coef_[0]
    np.testing.assert_allclose(fit.ratings_, coef[:models] - coef[:models].mean(), atol=1e-4)
    np.testing.assert_allclose(fit.style_, coef[models:], atol=1e-4)
    spread = fit.bootstrap(60, seed=0).std(axis=0) / np.sqrt(np.diag(fit.covariance()))
    np.testing.assert_allclose(spread, 1, atol=0.35)
    assert fit.bootstrap(3, seed=0).shape == (3, models)


def test_style_that_tells_every_winner_is_refused():
    outcome = np.array([1, 0, 1, 0, 1, 0, 0, 1], float)
    first, second = np.array([0, 0, 0, 0, 1, 1, 0, 0]), np.array([1, 1, 1, 1, 2, 2, 2, 2])
    with pytest.raises(UserError, match="tell the winners by themselves"):
        BradleyTerry(style=True).fit(table(first, second, outcome, style=(2 * outcome - 1)[:, None]))


def test_models_that_never_met_are_ranked_apart():
    battles = table([0, 0, 2, 2, 3], [1, 1, 3, 3, 4], [1, 0, 1, 0, 0.5], count=[3, 1, 1, 1, 2])
    fit = BradleyTerry().fit(battles)
    assert fit.components_.tolist() == [0, 0, 1, 1, 1]
    assert fit.ratings_[0] - fit.ratings_[1] == pytest.approx(np.log(3))
    assert fit.ratings_[:2].sum() == pytest.approx(0, abs=1e-12)
    assert np.isnan(fit.win_probability()[0, 2])
    rows = fit.leaderboard(fit.bootstrap(50))
    assert [row["component"] for row in rows] == [0, 0, 0, 1, 1]
    assert {row["model"] for row in rows[:3]} == {"m02", "m03", "m04"}
    assert [row["rank"] for row in rows][3:] == [1, 2]
    assert all(np.isfinite([row["rating"], row["low"], row["high"]]).all() for row in rows)


def test_a_model_that_won_or_lost_all_is_finite_and_flagged():
    battles = table([0, 0, 1, 1], [1, 2, 2, 2], [1, 1, 1, 0], count=[5, 5, 3, 3])
    fit = BradleyTerry().fit(battles)
    assert fit.unbounded_ == ("won all", "", "")
    assert np.isfinite(fit.ratings_).all()
    assert fit.ratings_[0] > fit.ratings_[1]
    assert fit.ratings_[1] == pytest.approx(fit.ratings_[2], abs=0.02)
    assert np.isfinite(fit.bootstrap(40)).all()
    one = BradleyTerry().fit(table([0], [1], [1]))
    assert one.unbounded_ == ("won all", "lost all")
    assert np.isfinite(one.ratings_).all()
    assert np.isfinite([row["low"] for row in one.leaderboard()]).all()
    # Two groups, one of which always beats the other, though nobody has won all.
    groups = table([0, 0, 2, 2, 0], [1, 1, 3, 3, 2], [1, 0, 1, 0, 1])
    assert BradleyTerry().fit(groups).unbounded_ == ("one-way",) * 4


def test_leaderboard_scales_anchors_and_intervals():
    battles, _ = simulated(models=5, battles=3000, seed=2)
    fit = BradleyTerry().fit(battles)
    replicates = fit.bootstrap(200)
    logit = {row["model"]: row for row in fit.leaderboard(replicates, scale="logit")}
    elo = {row["model"]: row for row in fit.leaderboard(replicates)}
    rate = {row["model"]: row for row in fit.leaderboard(replicates, scale="winrate", anchor="m03")}
    place = {name: index for index, name in enumerate(fit.models_)}
    for name in fit.models_:
        assert logit[name]["rating"] == pytest.approx(fit.ratings_[place[name]])
        assert elo[name]["rating"] == pytest.approx(1000 + 400 * np.log10(np.e) * fit.ratings_[place[name]])
        assert rate[name]["rating"] == pytest.approx(100 * fit.win_probability()[place[name], 3])
        assert elo[name]["low"] < elo[name]["rating"] < elo[name]["high"]
    assert rate["m03"]["low"] == rate["m03"]["high"] == pytest.approx(50)
    ordered = sorted(fit.models_, key=lambda name: -logit[name]["rating"])
    assert [row["model"] for row in fit.leaderboard()] == ordered
    assert [logit[name]["rank"] for name in ordered] == [1, 2, 3, 4, 5]
    for name in ordered:
        surely = sum(logit[other]["low"] > logit[name]["high"] for other in ordered)
        assert logit[name]["best_rank"] == 1 + surely
    normal = {row["model"]: row for row in fit.leaderboard(scale="logit", anchor="m03")}
    drawn = {row["model"]: row for row in fit.leaderboard(replicates, scale="logit", anchor="m03")}
    for name in ("m00", "m01"):
        assert normal[name]["high"] - normal[name]["low"] == pytest.approx(
            drawn[name]["high"] - drawn[name]["low"], rel=0.2
        )


def test_arguments_are_checked():
    battles, _ = simulated(models=3, battles=50)
    with pytest.raises(ValueError, match="ties is 'no'"):
        BradleyTerry(ties="no")
    with pytest.raises(ValueError, match="l2 is -1"):
        BradleyTerry(l2=-1)
    with pytest.raises(UserError, match="no battle that is not a tie"):
        BradleyTerry(ties="drop").fit(table([0], [1], [0.5]))
    with pytest.raises(UserError, match="style control needs"):
        BradleyTerry(style=True).fit(battles)
    with pytest.raises(UserError, match="style_0 does not vary"):
        BradleyTerry(style=True).fit(table([0, 0], [1, 1], [0, 1], style=np.ones((2, 1))))
    with pytest.raises(UserError, match="cannot be told apart"):
        # The covariate is the second model's name.
        BradleyTerry(style=True).fit(
            table([0, 0, 0, 0, 1], [1, 1, 2, 2, 2], [0, 1, 0, 1, 0.5], style=np.array([[0.0], [0], [1], [1], [1]]))
        )
    fit = BradleyTerry().fit(battles)
    with pytest.raises(UserError, match="name no prompts"):
        fit.bootstrap(10, unit="prompt")
    with pytest.raises(ValueError, match="rounds is 0"):
        fit.bootstrap(0)
    with pytest.raises(UserError, match="the anchor 'x' is none of the models"):
        fit.leaderboard(anchor="x")
    with pytest.raises(UserError, match="a win rate is against a model"):
        fit.leaderboard(scale="winrate")
