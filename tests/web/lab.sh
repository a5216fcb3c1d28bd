#!/usr/bin/env bash
# The lab's report in headless Chromium, as wide as a phone: nothing sticks out of the page, tables
# that are wider scroll by themselves and keep their first column.
set -euo pipefail
tril=$1
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
    echo "skipped: no Chromium"
    exit 77
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$tril" lab run averaging --quick --out "$dir/lab" >/dev/null
"$tril" lab report --out "$dir/lab" >/dev/null
cat >"$dir/frame.html" <<'PAGE'
<iframe id=page src="lab/report.html" style="width:390px;height:2000px"></iframe><pre id=report></pre>
<script>
page.onload = () => {
    const d = page.contentDocument, wide = d.documentElement.clientWidth;
    let said = "", bad = 0, scrolling = 0;
    const check = (good, what) => { if (!good) { bad++; said += "FAILED: " + what + "\n"; } };
    check(d.documentElement.scrollWidth <= wide, "the page is wider than the screen");
    check(d.querySelectorAll("table").length >= 3, "there are no tables");
    for (const e of d.body.querySelectorAll("*"))
        if (!e.closest(".scroll") && !e.closest("svg"))
            check(e.getBoundingClientRect().right <= wide + 1, e.tagName + " sticks out");
    for (const s of d.querySelectorAll(".scroll")) {
        const most = s.scrollWidth - s.clientWidth;
        if (most < 1) continue;
        scrolling++;
        s.scrollLeft = most;
        check(s.scrollLeft > 0, "a table does not scroll");
        const first = s.querySelector("td").getBoundingClientRect().left;
        check(Math.abs(first - s.getBoundingClientRect().left) < 2, "the first column leaves");
    }
    check(scrolling > 0, "no table is wider than the screen: this tests nothing");
    report.textContent = said + (bad ? "" : "all good");
};
</script>
PAGE
# A browser that cannot start at all is no fault of the page.
if ! timeout 150 "$browser" --headless --no-sandbox --disable-gpu --allow-file-access-from-files \
    --user-data-dir="$dir/profile" --window-size=800,2000 --virtual-time-budget=10000 --dump-dom \
    "file://$dir/frame.html" >"$dir/dom" 2>"$dir/log" && ! grep -q '<html' "$dir/dom"; then
    echo "skipped: Chromium does not start here: $(tail -1 "$dir/log")"
    exit 77
fi
sed 's/<[^>]*>//g' "$dir/dom" >"$dir/report"
grep '^FAILED' "$dir/report" || grep '^all good' "$dir/report"
! grep -q '^FAILED' "$dir/report"
