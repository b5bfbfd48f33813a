//! Medians, spreads and ratios.
//!
//! A ratio compares a sample with the sample of `direct` from the same repetition, which was taken at nearly the same time;
//! the median and the spread are those of these ratios. A contender with an invalid sample gets no figure in that work,
//! and a contender that failed the work [`VERIFY`] gets no figure in any work.
//!
//! Pure.

use super::run::{Run, Sample, Work};

/// The contender without a relay.
pub(super) const DIRECT: &str = "direct";
/// The work that compares every byte.
const VERIFY: &str = "verify";

/// The median of some values, with the least and the most of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    pub(super) fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 };
        Some(Spread { median, least, most })
    }
}

impl Run {
    /// The names of the contenders with samples in `work`, in the order of the run.
    pub(super) fn contenders_in(&self, work: &Work) -> Vec<&str> {
        let measured = |name: &str| self.samples_of(&work.name, name).next().is_some();
        self.conditions
            .contenders
            .iter()
            .map(|each| each.name.as_str())
            .filter(|name| measured(name))
            .collect()
    }

    /// The reason why `contender` gets no figure in `work`, if there is one.
    pub(super) fn invalid(&self, work: &Work, contender: &str) -> Option<String> {
        let failed = |work: &str| {
            let all = self.samples_of(work, contender).count();
            let mut reasons = self.samples_of(work, contender).filter_map(|sample| sample.invalid.as_deref());
            reasons.next().map(|reason| format!("{} of {all}: {reason}", reasons.count() + 1))
        };
        failed(&work.name).or_else(|| failed(VERIFY).map(|reason| format!("{VERIFY}: {reason}")))
    }

    /// The values of one figure; `None` where the contender is invalid or has no such figure.
    pub(super) fn values(&self, work: &Work, contender: &str, key: &str) -> Option<Spread> {
        if self.invalid(work, contender).is_some() {
            return None;
        }
        Spread::of(
            self.samples_of(&work.name, contender)
                .filter_map(|each| each.figures.get(key).copied())
                .collect(),
        )
    }

    /// The same, each value divided by that of `direct` in the same repetition.
    pub(super) fn ratios(&self, work: &Work, contender: &str, key: &str) -> Option<Spread> {
        if self.invalid(work, contender).or_else(|| self.invalid(work, DIRECT)).is_some() {
            return None;
        }
        let ratio = |sample: &Sample| {
            let mut direct = self.samples_of(&work.name, DIRECT);
            let direct = direct.find(|each| each.repetition == sample.repetition)?.figures.get(key)?;
            (*direct > 0.0).then_some(sample.figures.get(key)? / direct)
        };
        Spread::of(self.samples_of(&work.name, contender).filter_map(ratio).collect())
    }

    /// The largest load of other processes during a sample, in processors.
    pub(super) fn foreign_processors_max(&self) -> f64 {
        self.samples.iter().map(|sample| sample.foreign_processors).fold(0.0, f64::max)
    }

    fn samples_of(&self, work: &str, contender: &str) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |sample| sample.work == work && sample.contender == contender)
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{run_of, sample};
    use super::*;

    fn assert_close(value: Option<Spread>, median: f64, least: f64, most: f64) {
        let value = value.unwrap();
        for (is, wanted) in [(value.median, median), (value.least, least), (value.most, most)] {
            assert!((is - wanted).abs() < 1e-9, "{value:?}");
        }
    }

    #[test]
    fn a_ratio_compares_samples_of_one_repetition() {
        let run = run_of(&[
            sample(1, "direct", 100.0),
            sample(1, "landfall", 50.0),
            sample(2, "direct", 200.0),
            sample(2, "landfall", 180.0),
            sample(3, "direct", 100.0),
            sample(3, "landfall", 70.0),
        ]);
        let work = run.works().next().unwrap();
        assert_close(run.ratios(work, "landfall", "per_second"), 0.7, 0.5, 0.9);
        assert_close(run.values(work, "landfall", "per_second"), 70.0, 50.0, 180.0);
    }

    #[test]
    fn one_invalid_sample_invalidates_the_contender() {
        let bad = r#"{"kind":"sample","repetition":2,"work":"http-64","contender":"landfall",
            "invalid":"no processor time","foreign_processors":0}"#;
        let run = run_of(&[sample(1, "landfall", 50.0), bad.replace('\n', "")]);
        let work = run.works().next().unwrap();
        assert_eq!(run.invalid(work, "landfall").as_deref(), Some("1 of 2: no processor time"));
        assert_eq!(run.values(work, "landfall", "per_second"), None);
    }

    #[test]
    fn wrong_bytes_invalidate_every_work() {
        let bad = r#"{"kind":"sample","repetition":1,"work":"verify","contender":"landfall",
            "invalid":"wrong bytes","foreign_processors":0}"#;
        let run = run_of(&[sample(1, "landfall", 50.0), bad.replace('\n', "")]);
        let work = run.works().find(|work| work.name == "http-64").unwrap();
        assert_eq!(run.invalid(work, "landfall").as_deref(), Some("verify: 1 of 1: wrong bytes"));
    }

    #[test]
    fn the_median_of_an_even_number_is_the_mean_of_the_middle() {
        assert_close(Spread::of(vec![4.0, 1.0, 3.0, 2.0]), 2.5, 1.0, 4.0);
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
