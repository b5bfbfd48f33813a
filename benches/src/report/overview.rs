//! The part of a run that other pages show: a table of the headline works, and links to charts.
//!
//! It is between two comments of such a page, [`START`] and [`END`]; `compare --publish` replaces it.
//!
//! Pure.

use super::run::{Better, Figure, Run, Work};
use super::summary::{DIRECT, Spread};
use super::table::short;

/// The comment before the generated part of a page.
pub const START: &str = "<!-- figures: `benches/compare --publish` writes the lines from here -->";
/// The comment after it.
pub const END: &str = "<!-- figures: end -->";

/// Returns the generated part of the front page. `results` is the path from that page to the directory of the run.
pub fn headline(run: &Run, results: &str) -> String {
    let of = &run.conditions;
    let ours: Vec<&str> =
        of.contenders.iter().filter(|each| each.ours).map(|each| each.name.as_str()).collect();
    let ours: Vec<&str> = ours.into_iter().filter(|name| run.has_headline(name)).collect();
    let mut text = format!(
        "Commit {}, Linux {}, {} × {}, {}, medians of {} samples of {} s.\n\n",
        of.commit,
        of.machine.kernel,
        of.machine.processors,
        of.machine.processor,
        of.congestion_control,
        of.repetitions,
        of.seconds,
    );
    text += &format!("| | direct | {} | best other relay |\n", ours.join(" | "));
    text += &format!("| --- | ---: |{} ---: |\n", " ---: |".repeat(ours.len()));
    for work in run.works().filter(|work| work.headline) {
        for figure in work.figures.iter().filter(|figure| figure.charted) {
            let row = Row { run, work, figure };
            let own: Vec<String> = ours.iter().map(|name| row.cell(name)).collect();
            text += &format!(
                "| [{}]({results}/README.md#{}), {} | {} | {} | {} |\n",
                work.name,
                work.name,
                figure.label,
                row.cell(DIRECT),
                own.join(" | "),
                row.best_other(),
            );
        }
    }
    for work in run.works().filter(|work| work.headline && work.has_chart()).take(3) {
        text += &image(work, results);
    }
    text
}

/// Returns the charts of every work. `results` is the path from the page to the directory of the run.
pub fn charts(run: &Run, results: &str) -> String {
    run.works().filter(|work| work.has_chart()).map(|work| image(work, results)).collect()
}

/// Returns `page` with `generated` between its two comments, or `None` where the page does not have both.
pub fn replace(page: &str, generated: &str) -> Option<String> {
    let (before, rest) = page.split_once(START)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{START}\n\n{}\n\n{END}{after}", generated.trim_matches('\n')))
}

fn image(work: &Work, results: &str) -> String {
    format!("\n![{}: {}]({results}/{}.svg)\n", work.name, work.what, work.name)
}

impl Run {
    fn has_headline(&self, contender: &str) -> bool {
        let in_all = |work: &Work| self.contenders_in(work).contains(&contender);
        self.works()
            .any(|work| work.headline && work.figures.iter().any(|figure| figure.relative) && in_all(work))
    }
}

struct Row<'a> {
    run: &'a Run,
    work: &'a Work,
    figure: &'a Figure,
}

impl Row<'_> {
    fn value(&self, contender: &str) -> Option<Spread> {
        self.run.values(self.work, contender, &self.figure.key)
    }

    /// The value, and for a relative figure the ratio to `direct`.
    fn cell(&self, contender: &str) -> String {
        let Some(value) = self.value(contender) else { return "–".to_owned() };
        let ratio = self.run.ratios(self.work, contender, &self.figure.key);
        match ratio.filter(|_| self.figure.relative && contender != DIRECT) {
            Some(ratio) => format!("{} ({})", short(value.median), short(ratio.median)),
            None => short(value.median),
        }
    }

    fn best_other(&self) -> String {
        let contenders = self.run.conditions.contenders.iter();
        let others = contenders.filter(|each| !each.ours && each.name != DIRECT);
        let medians = others.filter_map(|each| Some((each.name.as_str(), self.value(&each.name)?.median)));
        let best = match self.figure.better {
            Better::More => medians.max_by(|one, other| one.1.total_cmp(&other.1)),
            Better::Less => medians.min_by(|one, other| one.1.total_cmp(&other.1)),
        };
        best.map_or_else(|| "–".to_owned(), |(name, _)| format!("{} {name}", self.cell(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{run_of, sample};
    use super::*;

    #[test]
    fn the_headline_has_our_figures_and_the_best_other_relay() {
        let run = run_of(&[
            sample(1, "direct", 1000.0),
            sample(1, "landfall", 900.0),
            sample(1, "pasta", 500.0),
            sample(1, "tokio", 600.0),
        ]);
        let text = headline(&run, "results");
        let expected = "\
| | direct | landfall | best other relay |
| --- | ---: | ---: | ---: |
| [http-64](results/README.md#http-64), requests/s | 1,000 | 900 (0.900) | 600 (0.600) tokio |
| [http-64](results/README.md#http-64), p99 µs | 1,000 | 1,110 | 1,670 tokio |

![http-64: 64 connections](results/http-64.svg)
";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn only_the_text_between_the_comments_is_replaced() {
        let page = format!("before\n{START}\n\nold\n\n{END}\nafter\n");
        let replaced = replace(&page, "\nnew\n").unwrap();
        assert_eq!(replaced, format!("before\n{START}\n\nnew\n\n{END}\nafter\n"));
        assert_eq!(replace(&replaced, "new").as_deref(), Some(replaced.as_str()));
        assert_eq!(replace("no comments", "new"), None);
    }
}
