#!/usr/bin/env bash
# wandb 0.31.0: an init that fails for want of its server keeps the run's id, so that the same run cannot be begun offline instead.
#
# A training of hours that finds W&B's server unreachable wants to go on offline, under the id that it has noted for a later resume.
# wandb.init(id=...) raises CommError after init_timeout, as it should. wandb.init(id=..., mode="offline") in the same process then
# fails too, after no attempt at any server, with "run ID ... is in use": the background service, which the first call started, still
# holds the run that never began. The error is a ServerResponseError of wandb.sdk.mailbox, not one of wandb.errors, so a handler
# of wandb.Error does not see it. Another id begins; so does the same one after wandb.teardown(), which ends the service, and every
# other run of the process with it.
#
# Output seen (wandb 0.31.0, Python 3.11, Linux, 2026-11-28):
#   online, nobody listens: CommError
#   offline, same id: ServerResponseError: run ID abc is in use; a wandb.Error: False
#   offline, another id: began
#   offline, same id, after teardown: began
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0

cat > "$folder/try.py" <<'PYTHON'
import wandb


def attempt(what, **how):
    try:
        settings = wandb.Settings(init_timeout=3, silent=True)
        wandb.init(project="p", dir=".", settings=settings, **{"id": "abc", **how}).finish()
        print(f"{what}: began")
    except Exception as error:
        name = type(error).__name__
        said = "" if name == "CommError" else f": {error}; a wandb.Error: {isinstance(error, wandb.Error)}"
        print(f"{what}: {name}{said}")


attempt("online, nobody listens")
attempt("offline, same id", mode="offline")
attempt("offline, another id", id="other", mode="offline")
wandb.teardown()
attempt("offline, same id, after teardown", mode="offline")
PYTHON

key=$(printf 'a%.0s' {1..40})
(cd "$folder" && WANDB_BASE_URL=http://127.0.0.1:9 WANDB_API_KEY=$key venv/bin/python try.py 2> err.log) | tee "$folder/out"
diff - "$folder/out" <<'SEEN'
online, nobody listens: CommError
offline, same id: ServerResponseError: run ID abc is in use; a wandb.Error: False
offline, another id: began
offline, same id, after teardown: began
SEEN
