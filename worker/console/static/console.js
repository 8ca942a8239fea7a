// On every page: fetching live figures, a forecast's progress, and forms that are sent only once.
"use strict";

// Fetch `url` every `everyMs` while the page is visible, until `show` returns false; `lost` is called after a failure.
window.follow = (url, everyMs, show, lost = () => {}) => {
    let timer = 0;
    const again = () => { timer = setTimeout(look, everyMs); };
    const look = async () => {
        if (document.hidden) return again();
        let go = true;
        try {
            const answer = await fetch(url, { headers: { Accept: "application/json" }, signal: AbortSignal.timeout(10000) });
            if (answer.status === 401) {
                location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
                return;
            }
            if (!answer.ok) throw new Error(`status ${answer.status}`);
            go = show(await answer.json()) !== false;
        } catch (error) {
            lost(error);
        }
        if (go) again();
    };
    document.addEventListener("visibilitychange", () => {
        if (!document.hidden && timer) {
            clearTimeout(timer);
            timer = 0;
            look();
        }
    });
    look();
};

const forecast = document.querySelector("[data-forecast]");
if (forecast) {
    const total = Math.max(1, Number(forecast.dataset.total));
    follow(forecast.dataset.forecast, 400, ({ done, is_over: isOver }) => {
        document.getElementById("forecast-done").textContent = done.toLocaleString("en");
        document.getElementById("forecast-bar").style.width = `${Math.min(100, 100 * done / total)}%`;
        if (!isOver) return true;
        // Keep what was typed meanwhile: these fields go into the URL, the reason into sessionStorage.
        const address = new URL(location.href);
        for (const name of ["canary", "rate"]) {
            const field = document.getElementById(name);
            if (field?.value) address.searchParams.set(name, field.value);
        }
        const reason = document.getElementById("reason")?.value;
        if (reason) sessionStorage.setItem("tombola.reason", reason);
        location.replace(address);
        return false;
    });
}
const reason = document.getElementById("reason");
if (reason && !forecast) {
    reason.value = sessionStorage.getItem("tombola.reason") ?? reason.value;
    sessionStorage.removeItem("tombola.reason");
}

// A second click sends nothing. A page that the browser restores from its back-forward cache can send its form again.
const buttons = () => document.querySelectorAll("form[method=post] button");
document.addEventListener("submit", ({ target }) => {
    if (target.method === "post") setTimeout(() => target.querySelectorAll("button").forEach((it) => { it.disabled = true; }));
});
addEventListener("pageshow", ({ persisted }) => { if (persisted) buttons().forEach((it) => { it.disabled = false; }); });
