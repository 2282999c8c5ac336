#!/usr/bin/env bash
# hydra-optuna-sweeper 1.3.0 with optuna 2.10.1: one trial that returns NaN ends the whole search, whatever max_failure_rate says.
#
# Optuna itself takes NaN for a failed trial and goes on: study.optimize notes FAIL and draws the next. Under Hydra's sweeper the value
# is told as a complete trial's, optuna refuses NaN with a ValueError, and the handler of that error tells the trial as failed
# together with the same value, which optuna refuses too: a failed trial takes none. That second error is caught by nothing. A diverged
# training, which a search over learning rates is likely to meet, so ends an overnight sweep at its first occurrence, with a
# traceback about "values" and without the remaining trials. hydra.sweeper.max_failure_rate=1.0, which is there so that failures do
# not end a search, is not reached; it does help where the trial raises instead of returning NaN.
#
# Output seen (hydra-core 1.3.3, hydra-optuna-sweeper 1.3.0, optuna 2.10.1, SQLAlchemy 1.4.54, Python 3.11, Linux, 2026-11-27):
#   optuna alone: 4 trials, of which FAIL: 2
#   hydra, trials that return NaN: exit 1, ran 1 of 4, ends in: ValueError
#   hydra, trials that raise: exit 0, ran 4 of 4
# What helps: return infinity (for minimising) where the metric is NaN.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check hydra-core==1.3.3 hydra-optuna-sweeper==1.3.0 \
	optuna==2.10.1 SQLAlchemy==1.4.54 alembic==1.18.5

cat > "$folder/alone.py" <<'PYTHON'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.create_study()
study.optimize(lambda trial: float("nan") if trial.number % 2 == 0 else trial.suggest_float("x", 0, 1), n_trials=4)
failed = sum(trial.state == optuna.trial.TrialState.FAIL for trial in study.trials)
print(f"optuna alone: {len(study.trials)} trials, of which FAIL: {failed}")
PYTHON
mkdir "$folder/conf"
cat > "$folder/conf/config.yaml" <<'YAML'
defaults:
  - override hydra/sweeper: optuna
x: 0.0
how: value
YAML
cat > "$folder/app.py" <<'PYTHON'
import hydra
from hydra.core.hydra_config import HydraConfig


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    number = HydraConfig.get().job.num
    print("trial", number, flush=True)
    if number % 2 == 0:
        if cfg.how == "raise":
            raise RuntimeError("diverged")
        return float("nan")
    return cfg.x


main()
PYTHON

search() {
	(cd "$folder" && venv/bin/python app.py -m how="$1" "x=interval(0,1)" hydra.sweeper.n_trials=4 hydra.sweeper.n_jobs=1 \
		hydra.sweeper.max_failure_rate=1.0) > "$folder/log" 2>&1
}
"$folder/venv/bin/python" -W ignore "$folder/alone.py" 2> "$folder/alone.log" | tee "$folder/alone.out"
grep -qx "optuna alone: 4 trials, of which FAIL: 2" "$folder/alone.out"

status=0; search value || status=$?
ran=$(grep -c '^trial ' "$folder/log"); last=$(grep -oE '^[A-Za-z]+Error' "$folder/log" | tail -1)
echo "hydra, trials that return NaN: exit $status, ran $ran of 4, ends in: $last"
[ "$status" = 1 ] && [ "$ran" = 1 ] && [ "$last" = ValueError ]

status=0; search raise || status=$?
ran=$(grep -c '^trial ' "$folder/log")
echo "hydra, trials that raise: exit $status, ran $ran of 4"
[ "$status" = 0 ] && [ "$ran" = 4 ]
