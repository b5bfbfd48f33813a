//! The Markdown of a run.
//!
//! Pure.

use super::run::{Better, Figure, Run, Work};
use super::summary::{DIRECT, Spread};

/// Returns the conditions of a run, then for each work its chart and its table. The charts are `WORK.svg` beside the page.
pub fn document(run: &Run) -> String {
    let mut text =
        String::from("# Results\n\nWritten by `benches/compare`; see [the method](../../README.md).\n\n");
    text += &conditions(run);
    for work in run.works() {
        text += &format!("\n## {}\n\n{}\n\n", work.name, work.what);
        if work.has_chart() {
            text += &format!("![{0}: every contender beside direct connections]({0}.svg)\n\n", work.name);
        }
        text += &table(run, work);
    }
    text
}

/// Returns the tables alone, for a terminal.
pub fn tables(run: &Run) -> String {
    run.works().map(|work| format!("### {}: {}\n\n{}\n", work.name, work.what, table(run, work))).collect()
}

fn conditions(run: &Run) -> String {
    let of = &run.conditions;
    let versions: Vec<String> =
        of.versions.iter().map(|(name, text)| format!("{name}: {}", cell(text))).collect();
    format!(
        "| | |\n| --- | --- |\n| commit | {} |\n| time | {} |\n| kernel | {} |\n| machine | {} × {}, {} GiB |\n\
         | congestion control | {} |\n| other load before the run | {:.2} of {} processors, after {:.0} s of waiting |\n\
         | other load during a sample, at most | {:.2} processors |\n| samples | {} of {} s each |\n| versions | {} |\n\n\
         Each figure is the median, with the least and the most in brackets. Bold is the best relay of a column. A ratio\n\
         divides each value by the value of `direct` in the same repetition.\n",
        of.commit,
        of.started,
        of.machine.kernel,
        of.machine.processors,
        cell(&of.machine.processor),
        of.machine.memory_gib,
        of.congestion_control,
        of.idle.busy_processors,
        of.machine.processors,
        of.idle.waited_seconds,
        run.foreign_processors_max(),
        of.repetitions,
        of.seconds,
        versions.join("; "),
    )
}

fn table(run: &Run, work: &Work) -> String {
    let contenders = run.contenders_in(work);
    let with_ratio = contenders.contains(&DIRECT);
    let mut columns: Vec<Column<'_>> =
        work.figures.iter().map(|figure| Column { run, work, figure, is_ratio: false }).collect();
    if let Some(figure) = work.figures.first().filter(|figure| figure.relative && with_ratio) {
        columns.insert(1, Column { run, work, figure, is_ratio: true });
    }
    let headings: Vec<String> = columns.iter().map(Column::heading).collect();
    let mut text = format!("| | {} |\n| --- |{}\n", headings.join(" | "), " ---: |".repeat(columns.len()));
    let best: Vec<Option<&str>> = columns.iter().map(|column| column.best(&contenders)).collect();
    for name in &contenders {
        let cells: Vec<String> = match run.invalid(work, name) {
            Some(reason) => std::iter::once(format!("invalid, {}", cell(&reason)))
                .chain(std::iter::repeat_n(String::new(), columns.len() - 1))
                .collect(),
            None => columns
                .iter()
                .zip(&best)
                .map(|(column, best)| column.cell(name, *best == Some(*name)))
                .collect(),
        };
        text += &format!("| {name} | {} |\n", cells.join(" | "));
    }
    text
}

struct Column<'a> {
    run: &'a Run,
    work: &'a Work,
    figure: &'a Figure,
    is_ratio: bool,
}

impl Column<'_> {
    fn heading(&self) -> String {
        if self.is_ratio { "× direct".to_owned() } else { self.figure.label.clone() }
    }

    fn spread(&self, contender: &str) -> Option<Spread> {
        if self.is_ratio {
            self.run.ratios(self.work, contender, &self.figure.key)
        } else {
            self.run.values(self.work, contender, &self.figure.key)
        }
    }

    /// The relay with the best median; `None` where several share it.
    fn best<'n>(&self, contenders: &[&'n str]) -> Option<&'n str> {
        let relays = contenders.iter().filter(|name| **name != DIRECT);
        let mut medians: Vec<(&str, f64)> =
            relays.filter_map(|name| Some((*name, self.spread(name)?.median))).collect();
        medians.sort_by(|one, other| match self.figure.better {
            Better::More => other.1.total_cmp(&one.1),
            Better::Less => one.1.total_cmp(&other.1),
        });
        match medians.as_slice() {
            [first, second, ..] if first.1.total_cmp(&second.1).is_eq() => None,
            medians => medians.first().map(|first| first.0),
        }
    }

    fn cell(&self, contender: &str, is_best: bool) -> String {
        let Some(spread) = self.spread(contender) else { return "–".to_owned() };
        let median = if is_best { format!("**{}**", short(spread.median)) } else { short(spread.median) };
        if spread.least < spread.most {
            format!("{median} ({}–{})", short(spread.least), short(spread.most))
        } else {
            median
        }
    }
}

/// A text without the character that separates cells.
fn cell(text: &str) -> String {
    text.replace('|', "/")
}

/// Three significant digits; thousands in groups.
pub(super) fn short(value: f64) -> String {
    // "1.23e4" is rounded to three digits and has the exponent that decides on the decimals.
    let scientific = format!("{value:.2e}");
    let exponent = scientific.split('e').nth(1).and_then(|text| text.parse::<i32>().ok());
    let (Some(exponent), Ok(rounded)) = (exponent, scientific.parse::<f64>()) else { return scientific };
    let decimals = usize::try_from(2 - exponent).unwrap_or(0);
    grouped(&format!("{rounded:.decimals$}"))
}

/// Separates the thousands of a number without decimals.
fn grouped(digits: &str) -> String {
    if digits.contains('.') {
        return digits.to_owned();
    }
    let mut text = String::new();
    for (position, digit) in digits.char_indices() {
        if (digits.len() - position).is_multiple_of(3) && text.ends_with(|last: char| last.is_ascii_digit()) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn sample(repetition: u32, contender: &str, per_second: f64) -> String {
        format!(
            r#"{{"kind":"sample","repetition":{repetition},"work":"http-64","contender":"{contender}","figures":{{"per_second":{per_second},"p99_us":{}}},"foreign_processors":0.1}}"#,
            1e6 / per_second
        )
    }

    pub(in super::super) fn run_of(samples: &[String]) -> Run {
        let conditions = serde_json::json!({
            "kind": "run", "started": "2026-01-01T00:00:00+00:00", "commit": "abc1234", "congestion_control": "cubic",
            "machine": { "kernel": "6.18", "processor": "A | B", "processors": 2, "memory_gib": 8 },
            "idle": { "busy_processors": 0.02, "waited_seconds": 0 }, "seconds": 5, "repetitions": 3,
            "contenders": [
                { "name": "direct", "ours": false }, { "name": "landfall", "ours": true }, { "name": "pasta", "ours": false },
                { "name": "tokio", "ours": false },
            ],
            "works": [
                { "name": "verify", "what": "every byte", "headline": false, "figures": [] },
                { "name": "http-64", "what": "64 connections", "headline": true, "figures": [
                    { "key": "per_second", "label": "requests/s", "better": "more", "charted": true, "relative": true },
                    { "key": "p99_us", "label": "p99 µs", "better": "less", "charted": true, "relative": false },
                ] },
            ],
            "versions": { "pasta": "passt 1" },
        });
        Run::parse(&format!("{conditions}\n{}\n", samples.join("\n"))).unwrap()
    }

    #[test]
    fn a_table_has_medians_spreads_and_ratios_and_marks_the_best_relay() {
        let run = run_of(&[
            sample(1, "direct", 1000.0),
            sample(1, "landfall", 900.0),
            sample(1, "pasta", 500.0),
            sample(2, "direct", 1000.0),
            sample(2, "landfall", 800.0),
            sample(2, "pasta", 500.0),
        ]);
        let expected = "\
### http-64: 64 connections

| | requests/s | × direct | p99 µs |
| --- | ---: | ---: | ---: |
| direct | 1,000 | 1.00 | 1,000 |
| landfall | **850** (800–900) | **0.850** (0.800–0.900) | **1,180** (1,110–1,250) |
| pasta | 500 | 0.500 | 2,000 |

";
        assert_eq!(tables(&run), expected);
        let page = document(&run);
        assert!(page.contains("| machine | 2 × A / B, 8 GiB |"), "{page}");
        assert!(page.contains("(http-64.svg)"), "{page}");
    }

    #[test]
    fn an_invalid_contender_has_its_reason_instead_of_figures() {
        let bad = r#"{"kind":"sample","repetition":1,"work":"http-64","contender":"pasta","invalid":"a|b","foreign_processors":0}"#;
        let run = run_of(&[sample(1, "direct", 1000.0), bad.to_owned()]);
        assert!(tables(&run).contains("| pasta | invalid, 1 of 1: a/b |  |  |"), "{}", tables(&run));
    }

    #[test]
    fn numbers_have_three_significant_digits() {
        for (value, text) in [
            (0.0, "0.00"),
            (0.09214, "0.0921"),
            (0.8501, "0.850"),
            (9.996, "10.0"),
            (33.27, "33.3"),
            (372.4, "372"),
            (999.6, "1,000"),
            (1234.0, "1,230"),
            (121_456.0, "121,000"),
            (1_234_567.0, "1,230,000"),
            (-1234.0, "-1,230"),
        ] {
            assert_eq!(short(value), text, "{value}");
        }
    }

    #[test]
    fn a_file_of_another_format_is_refused_with_the_line() {
        assert_eq!(Run::parse("").unwrap_err().to_string(), ReportError::Conditions.to_string());
        let error = Run::parse(&format!("{}\n", sample(1, "direct", 1.0))).unwrap_err();
        assert!(matches!(error, ReportError::Conditions), "{error}");
        let error = Run::parse("{\"kind\":\"other\"}\n").unwrap_err().to_string();
        assert!(error.starts_with("line 1: unknown variant"), "{error}");
    }

    use super::super::run::ReportError;
}
