// What every page has: fetching what changes, a forecast's progress, and forms that are sent once.
"use strict";

// Ask for `url` every `everyMs` while the page is looked at; `show` may return false: that was all.
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
        // What was typed in meanwhile stays: the form's fields travel in the address.
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

// A second click sends nothing; a page that comes back from the browser's memory can be sent again.
const buttons = () => document.querySelectorAll("form[method=post] button");
document.addEventListener("submit", ({ target }) => {
    if (target.method === "post") setTimeout(() => target.querySelectorAll("button").forEach((it) => { it.disabled = true; }));
});
addEventListener("pageshow", ({ persisted }) => { if (persisted) buttons().forEach((it) => { it.disabled = false; }); });
