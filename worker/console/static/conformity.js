// The report of a campaign: a chart of prizes, of wins by hour and of tickets for each version, fetched once.
"use strict";
{
    const OBSERVED = "#4299e1";
    const EXPECTED = "#f59f00";
    const style = getComputedStyle(document.documentElement);
    Chart.defaults.font.family = style.getPropertyValue("--tblr-font-sans-serif") || "sans-serif";
    const paint = () => {
        Chart.defaults.color = getComputedStyle(document.body).color;
        Chart.defaults.borderColor = "rgba(128, 128, 128, 0.2)";
    };
    paint();

    const chart = (canvas, labels, datasets, y = {}) => new Chart(canvas, {
        data: { labels, datasets },
        options: {
            animation: false,
            maintainAspectRatio: false,
            interaction: { mode: "index", intersect: false },
            scales: {
                x: { grid: { display: false }, ticks: { maxTicksLimit: 10, maxRotation: 0, autoSkip: true } },
                y: { ticks: { maxTicksLimit: 6 }, ...y },
            },
            plugins: { legend: { align: "end", labels: { boxWidth: 10, boxHeight: 10 } } },
        },
    });
    const bars = (label, data) => ({ type: "bar", label, data, backgroundColor: OBSERVED });
    const line = (label, data) => ({
        type: "line", label, data, borderColor: EXPECTED, backgroundColor: EXPECTED, borderWidth: 2, pointRadius: 2, pointHitRadius: 8,
    });
    const charts = [];
    const draw = (version, row) => {
        const canvas = (name) => row.querySelector(`[data-chart="${name}"]`);
        charts.push(chart(
            canvas("prizes"),
            version.prizes.map((it) => it.code),
            [
                { type: "bar", label: "drawn", data: version.prizes.map((it) => it.observed), backgroundColor: OBSERVED },
                { type: "bar", label: "expected", data: version.prizes.map((it) => it.expected), backgroundColor: EXPECTED },
            ],
            { beginAtZero: true },
        ));
        const hours = Object.entries(version.wins.hour);
        charts.push(chart(canvas("hours"), hours.map(([hour]) => hour), [bars("standard deviations", hours.map(([, it]) => it.z))], {
            suggestedMin: -4,
            suggestedMax: 4,
        }));
        if (version.tickets) {
            const bins = version.tickets.bins.map((_, number) => `${number} %`);
            charts.push(chart(canvas("tickets"), bins, [line("expected", version.tickets.expected), bars("tickets", version.tickets.bins)], {
                beginAtZero: true,
            }));
        }
    };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTimeout(() => {
        paint();
        charts.forEach((it) => it.update());
    }));

    const rows = [...document.querySelectorAll("[data-version]")];
    if (rows.length) {
        follow(document.getElementById("report").dataset.report, 5000, (report) => {
            rows.forEach((row) => draw(report.versions[Number(row.dataset.version)], row));
            return false;
        });
    }
}
