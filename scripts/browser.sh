#!/usr/bin/env bash
# Opens the pages in a headless Chromium. It is installed where that can be done; where not, the tests are skipped with their reason.
source "$(dirname "$0")/environment.sh"
if ! command -v chromedriver > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; } > /dev/null || echo "no Chromium to be had here" >&2
fi
python -m pip install --quiet --disable-pip-version-check "selenium>=4.20" || echo "no selenium to be had here" >&2
python -m pytest -q -rs -m browser tests/cli/test_browser.py "$@"
