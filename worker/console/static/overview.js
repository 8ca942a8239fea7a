// The overview: numbers and charts, fetched every two seconds.
"use strict";
{
    const EVERY_MS = 2000;
    const at = (id) => document.getElementById(id);
    const text = (id, value) => { at(id).textContent = value ?? "?"; };
    const whole = (value) => (typeof value === "number" ? value.toLocaleString("en") : value);
    const make = (name, className, content) => {
        const element = document.createElement(name);
        if (className) element.className = className;
        if (content !== undefined) element.textContent = content;
        return element;
    };
    const COLOURS = { accepted: "#4299e1", settled: "#2fb344", rejected: "#f59f00", parked: "#d63939" };

    const style = getComputedStyle(document.documentElement);
    Chart.defaults.font.family = style.getPropertyValue("--tblr-font-sans-serif") || "sans-serif";
    const paint = () => {
        Chart.defaults.color = getComputedStyle(document.body).color;
        Chart.defaults.borderColor = "rgba(128, 128, 128, 0.2)";
    };
    paint();

    const chart = (id, type, names) => new Chart(at(id), {
        type,
        data: {
            labels: [],
            datasets: names.map((name) => ({
                label: name,
                data: [],
                borderColor: COLOURS[name],
                backgroundColor: type === "line" ? `${COLOURS[name]}22` : COLOURS[name],
                borderWidth: type === "line" ? 2 : 0,
                fill: type === "line",
                pointRadius: 0,
                pointHitRadius: 8,
                tension: 0.25,
            })),
        },
        options: {
            animation: false,
            maintainAspectRatio: false,
            interaction: { mode: "index", intersect: false },
            scales: {
                x: { grid: { display: false }, ticks: { maxTicksLimit: 7, maxRotation: 0, autoSkip: true }, stacked: type === "bar" },
                y: { beginAtZero: true, suggestedMax: 5, ticks: { precision: 0, maxTicksLimit: 5 }, stacked: type === "bar" },
            },
            plugins: { legend: { align: "end", labels: { boxWidth: 10, boxHeight: 10 } } },
        },
    });
    const charts = [chart("draws", "line", ["accepted", "settled"]), chart("troubles", "bar", ["rejected", "parked"])];
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTimeout(() => {
        paint();
        charts.forEach((it) => it.update());
    }));

    const draw = (minutes) => {
        for (const it of charts) {
            it.data.labels = minutes.labels;
            for (const dataset of it.data.datasets) dataset.data = minutes[dataset.label];
            it.update();
        }
    };

    const cause = ([name, count]) => {
        const item = make("a", "list-group-item list-group-item-action d-flex justify-content-between py-2", name);
        item.href = `/dead-letters?${new URLSearchParams({ cause: name })}`;
        item.append(make("b", "", whole(count)));
        return item;
    };
    const member = (it) => {
        const row = make("tr");
        row.append(make("td", "", it.role));
        const name = make("td", "text-break", it.name);
        name.title = `release ${it.version}, seen ${it.seen}`;
        row.append(name, make("td", "text-end text-nowrap", it.up), make("td", "text-end text-nowrap", it.clock));
        return row;
    };

    const show = (live) => {
        text("at", `${live.at} UTC`);
        at("pulse").className = "status-dot status-green status-dot-animated";
        at("warnings").replaceChildren(...live.warnings.map((it) => make("div", "alert alert-warning py-2 mb-2", it)));
        text("backlog", live.backlog);
        text("oldest", live.oldest ?? (live.backlog === null ? "?" : "–"));
        text("broker_backlog", whole(live.broker_backlog));
        text("open", whole(live.open));
        at("open").classList.toggle("text-danger", live.open > 0);
        at("causes").replaceChildren(...(live.causes.length
            ? live.causes.map(cause)
            : [make("div", "list-group-item text-secondary", live.open === null ? "Unknown." : "No open dead letters.")]));
        const members = live.members ?? [];
        const workers = members.filter((it) => it.role === "worker").length;
        text("workers", live.members === null ? null : whole(workers));
        at("workers").classList.toggle("text-danger", live.members !== null && workers === 0);
        const none = make("tr");
        const cell = make("td", "text-secondary", live.members === null ? "Unknown." : "No process is alive.");
        cell.colSpan = 4;
        none.append(cell);
        at("members").replaceChildren(...(members.length ? members.map(member) : [none]));
        text("audit", live.audit);
        text("conformity", live.conformity);
        if (live.minutes) draw(live.minutes);
    };
    const lost = () => {
        at("pulse").className = "status-dot status-red";
        at("warnings").replaceChildren(make("div", "alert alert-danger py-2 mb-2", "The console does not answer: the figures are out of date."));
    };
    follow("/live.json", EVERY_MS, show, lost);
}
