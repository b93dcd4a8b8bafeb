# A short suite on the oldest and on the newest releases that pyproject.toml promises. Sourced by
# tools/test --versions, with $root and $python set; arguments go to pytest. Takes some 7 GB and 10 minutes
# an end, where the package index has torch with CUDA alone.

short="tests/test_adapt.py tests/test_derivatives.py tests/test_devices.py tests/test_functional.py
    tests/test_learner.py tests/test_loop.py tests/test_per_step_norm.py tests/test_train_maml.py
    tests/test_tuning.py tests/test_user_code.py tests/laws/test_adjoint.py tests/laws/test_estimators.py
    tests/laws/test_rule_laws.py tests/recipe tests/runs/test_runs.py tests/tasks"

# The first of these interpreters that runs.
first() {
    for version in "$@"; do
        "python$version" -c '' 2>/dev/null && echo "python$version" && return
    done
}

# A line of constraints for every requirement: its lower bound, where the oldest is asked for.
bounds() {
    [ "$1" = newest ] || "$python" -c '
import re, sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
wanted = sum((extras[name] for name in ("images", "laws", "plot", "transformers")), project["dependencies"])
for requirement in wanted:
    name, version = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
    print(f"{name}=={version}.*")
' "$root/pyproject.toml"
}

failed=0
for end in oldest newest; do
    there=$root/.versions/$end
    echo "$end: making $there …"
    rm -rf "$there"
    [ "$end" = oldest ] && order="3.11 3.12 3.13 3.14" || order="3.14 3.13 3.12 3.11"
    # shellcheck disable=SC2086  # a list
    "$(first $order)" -m venv "$there"
    bounds "$end" >"$there/bounds"
    "$there/bin/python" -m pip install -q --disable-pip-version-check -c "$there/bounds" \
        -e "$root[images,laws,plot,transformers]" pytest-xdist
    "$there/bin/python" -c 'import platform, torch, numpy, pydantic, pytest, hypothesis
print(f"python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, "
      f"pydantic {pydantic.VERSION}, pytest {pytest.__version__}, hypothesis {hypothesis.__version__}")'
    # shellcheck disable=SC2086  # a list
    "$there/bin/python" -m pytest -q -p no:cacheprovider -n auto --dist worksteal $short "$@" || failed=1
done
exit $failed
