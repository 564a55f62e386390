#!/usr/bin/env bash
# The whole check: lint, format, types, tests. Makes .venv on its first run; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Tests start some hundred processes, which import the same files: their bytecode is kept.
unset PYTHONDONTWRITEBYTECODE

# What .venv was installed from: while it is unchanged, the install is skipped.
recipe() { pwd && cat pyproject.toml constraints.txt; }

if ! recipe | cmp --silent - .venv/recipe; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
    recipe > .venv/recipe
fi

# What tests need beside .venv: real vLLM for those of its plug-in, since what it requires would replace torch; a browser
# that looks at the status page.
install_others() {
    if ! cmp --silent tests/vllm_requirements.txt .vllm/recipe; then
        rm -rf .vllm
        .venv/bin/python -m pip install --quiet --no-deps --target .vllm --requirement tests/vllm_requirements.txt
        cp tests/vllm_requirements.txt .vllm/recipe
    fi
    if ! command -v chromium > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq
        apt-get install -qq -y --no-install-recommends chromium > /dev/null
    fi
}
(install_others) &

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
wait $!

# Replicas that come and go with their load, each with processes of its own, want the machine to themselves.
status=0
if [ $# = 0 ]; then
    .venv/bin/python -m pytest tests/serving/test_ray.py || status=$?
    set -- --ignore=tests/serving/test_ray.py
fi

# One torch thread a worker: the tests are many small ops, which do not gain from threads. One worker more than two
# cores have: tests wait for servers, ranks and deadlines.
.venv/bin/python -m pytest --numprocesses 3 --dist worksteal "$@" || status=$?
exit "$status"
