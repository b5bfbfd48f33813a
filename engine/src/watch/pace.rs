//! The pace: when to scan a namespace next. Pure: time and cost are arguments.
//!
//! All scans together may cost one part in [`COST_FACTOR`] of a core. Every namespace has an equal share of that, so an
//! expensive one does not slow the cheap ones: a scan that cost `c`, with `n` namespaces watched, is paid off after
//! `COST_FACTOR × n × c`. The next scan follows then, though never sooner than [`FLOOR`] after it. A namespace without a
//! change for [`QUIET_AFTER`] is scanned every [`QUIET`] only; its next change returns it to the floor.
//!
//! Changes come in groups (a dev server opens its port, then the one of its debugger), so for [`BURST`] after a change
//! scans follow each other at the floor, on credit: up to [`CREDIT`] of time may be owed. What is owed is paid off
//! afterwards by waiting twice as long between scans (not by one long wait, which would miss the next change). So the
//! bound holds in the long run, and a namespace that opens and closes ports without end only uses up its own credit. A
//! requested rescan uses the same credit.
//!
//! Where the kernel reports changes, a namespace rests for [`REST`] between scans, which then only confirm. A report causes
//! a scan on credit, at once, after [`RECHECK`] if it found no change, and after [`FLOOR`] in any case: the kernel reports a
//! listener before its table contains it (`inet_csk_listen_start`, `net/ipv4/inet_connection_sock.c`). No other scans follow
//! a change, since they would use up the credit that the next one needs.
//!
//! A virtual machine that its host suspends may charge a scan with a hundred times its cost. One such figure would
//! blind the watch for half a minute, so a scan is charged with at most twice the measured cost of the one before. A cost
//! that really grew is accounted for within a few scans.

use std::time::{Duration, Instant};

/// The shortest time between two scans of one namespace.
pub(super) const FLOOR: Duration = Duration::from_millis(20);

/// The time between two scans of a namespace without changes, where the kernel does not report any. With the time that a
/// scan and an open take, a new listener answers within 100 ms.
const QUIET: Duration = Duration::from_millis(80);

/// Time after its last change during which a namespace is scanned at the floor.
const QUIET_AFTER: Duration = Duration::from_secs(60);

/// The shortest time between two scans of one namespace when the kernel reports changes.
const REST: Duration = Duration::from_secs(1);

/// Time between a report of the kernel and a second scan for a listener that the first scan did not find.
const RECHECK: Duration = Duration::from_millis(3);

/// The duration of a burst: scans at the floor after a change.
const BURST: Duration = Duration::from_secs(1);

/// A share of 1 % of a core.
const COST_FACTOR: u32 = 100;

/// The largest debt: with one namespace, 20 ms of processor time spent at once.
const CREDIT: Duration = Duration::from_secs(2);

/// The assumed cost of the scan before the first one.
const COST_AT_FIRST: Duration = Duration::from_millis(5);

/// The longest wait for a scan, so that one wrong measurement (on a machine that was suspended) does not stop the scans.
const PAID_MAX: Duration = Duration::from_secs(60);

/// The result of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The reading failed: the listeners are unknown.
    Failed,
    /// The same listeners as before.
    Same,
    /// Other listeners than before.
    Change,
}

/// A scan that ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scan {
    /// The processor time that the scan used.
    pub(super) cost: Duration,
    pub(super) found: Found,
    /// The number of watched namespaces.
    pub(super) watched: usize,
    /// Whether the kernel reports changes.
    pub(super) hinted: bool,
}

/// The pace of one namespace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    due: Instant,
    /// When the cost of all scans so far is paid off.
    paid: Instant,
    burst_until: Instant,
    /// When the last change was found or expected.
    changed: Instant,
    /// When the kernel last reported a change, until the scans for it are done.
    hinted_at: Option<Instant>,
    last_cost: Duration,
}

impl Pace {
    /// The first scan is due at once. It starts no burst: the listeners that it finds were open before.
    pub(super) fn new(now: Instant) -> Pace {
        Pace {
            due: now,
            paid: now,
            burst_until: now,
            changed: now,
            hinted_at: None,
            last_cost: COST_AT_FIRST,
        }
    }

    /// When to scan next.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Records a scan that ended, and sets the time of the next one.
    pub(super) fn scanned(&mut self, now: Instant, scan: Scan) {
        let Scan { cost, found, watched, hinted } = scan;
        let watched = u32::try_from(watched).unwrap_or(u32::MAX);
        let charged = cost.min(self.last_cost.saturating_mul(2));
        self.last_cost = cost;
        let owed = charged.saturating_mul(COST_FACTOR).saturating_mul(watched.max(1)).min(PAID_MAX);
        self.paid = (self.paid.max(now) + owed).min(now + PAID_MAX);
        if found == Found::Change {
            self.changed = now;
            if !hinted {
                self.burst_until = now + BURST;
            }
        }
        let looks = self.hinted_at.map(|hinted_at| [hinted_at + RECHECK, hinted_at + FLOOR]);
        let looks = looks.into_iter().flatten().skip(usize::from(found == Found::Change));
        let look = looks.filter(|look| *look > now).min();
        self.hinted_at = self.hinted_at.filter(|_| look.is_some());
        let is_burst = now < self.burst_until;
        let is_quiet = now.saturating_duration_since(self.changed) >= QUIET_AFTER;
        let rest = match found {
            Found::Same | Found::Change if hinted && !is_burst => REST,
            _ if is_quiet => QUIET,
            _ => FLOOR,
        };
        let (next, may_owe) = match look {
            Some(look) => (look, CREDIT),
            None => (now + rest, if is_burst { CREDIT } else { Duration::ZERO }),
        };
        // Waiting twice the share pays off this scan and an equal part of the debt.
        self.due = self.payable(may_owe).min(now + owed.saturating_mul(2)).max(next);
    }

    /// The kernel reported a change in some namespace: scan at once as far as the credit reaches, and twice more to confirm.
    pub(super) fn hint(&mut self, now: Instant) {
        self.hinted_at = Some(now);
        self.changed = now;
        self.due = self.due.min(self.payable(CREDIT).max(now));
    }

    /// A caller expects a change: scan at once as far as the credit reaches, and start a burst.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.changed = now;
        self.burst_until = now + BURST;
        self.due = self.due.min(self.payable(CREDIT).max(now));
    }

    fn payable(&self, may_owe: Duration) -> Instant {
        self.paid.checked_sub(may_owe).unwrap_or(self.paid)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const US: Duration = Duration::from_micros(1);

    fn scan(cost: Duration, found: Found, watched: usize) -> Scan {
        Scan { cost, found, watched, hinted: false }
    }

    #[test]
    fn a_cheap_scan_repeats_at_the_floor() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert_eq!(pace.due(), now);
        pace.scanned(now, scan(100 * US, Found::Same, 1));
        assert_eq!(pace.due(), now + FLOOR);
    }

    #[test]
    fn a_quiet_namespace_is_scanned_less_often() {
        let start = Instant::now();
        let mut now = start;
        let mut pace = Pace::new(now);
        let mut scans = 0;
        while now < start + QUIET_AFTER {
            pace.scanned(now, scan(100 * US, Found::Same, 1));
            now = pace.due();
            scans += 1;
        }
        assert_eq!(scans, 3_000, "50 a second in the first minute");
        pace.scanned(now, scan(100 * US, Found::Same, 1));
        assert_eq!(pace.due(), now + QUIET);
        now = pace.due();
        pace.scanned(now, scan(100 * US, Found::Change, 1));
        assert_eq!(pace.due(), now + FLOOR, "after a change");
        now += QUIET_AFTER;
        pace.hurry(now);
        pace.scanned(now, scan(100 * US, Found::Same, 1));
        assert_eq!(pace.due(), now + FLOOR, "after a request");
    }

    #[test]
    fn an_expensive_scan_waits_a_hundred_times_its_cost_for_each_namespace() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        pace.scanned(now, scan(3 * MS, Found::Same, 1));
        assert_eq!(pace.due(), now + 300 * MS);
        let mut pace = Pace::new(now);
        pace.scanned(now, scan(3 * MS, Found::Same, 50));
        assert_eq!(pace.due(), now + 15_000 * MS);
    }

    #[test]
    fn scans_follow_a_change_at_the_floor_for_a_second() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        pace.scanned(now, scan(300 * US, Found::Change, 1));
        let end = now + BURST;
        while now < end {
            assert_eq!(pace.due(), now + FLOOR);
            now = pace.due();
            pace.scanned(now, scan(300 * US, Found::Same, 1));
        }
        assert!(pace.due() > now + FLOOR, "the debt is paid");
    }

    #[test]
    fn a_rescan_is_made_at_once_until_the_credit_is_used_up() {
        let start = Instant::now();
        let mut now = start;
        let mut pace = Pace::new(now);
        pace.scanned(now, scan(3 * MS, Found::Same, 1));
        let mut scans = 0;
        loop {
            pace.hurry(now);
            if pace.due() > now {
                break;
            }
            now += 3 * MS;
            pace.scanned(now, scan(3 * MS, Found::Same, 1));
            scans += 1;
        }
        assert!((5..9).contains(&scans), "{scans} scans on credit");
    }

    #[test]
    fn scans_only_confirm_where_the_kernel_reports_changes() {
        let hinted = |found| Scan { hinted: true, ..scan(300 * US, found, 1) };
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        pace.scanned(now, hinted(Found::Change));
        assert_eq!(pace.due(), now + REST, "the change is known");
        now += REST / 2;
        pace.hint(now);
        let hinted_at = now;
        for (found, next) in [
            (Found::Same, hinted_at + RECHECK),
            (Found::Same, hinted_at + FLOOR),
            (Found::Same, hinted_at + FLOOR + REST),
        ] {
            assert!(pace.due() >= now);
            now = pace.due();
            pace.scanned(now, hinted(found));
            assert_eq!(pace.due(), next);
        }
        pace.hint(now);
        pace.scanned(now, hinted(Found::Change));
        assert_eq!(pace.due(), now + FLOOR, "the reported change is found");
        now += FLOOR;
        pace.scanned(now, hinted(Found::Same));
        assert_eq!(pace.due(), now + REST);
        now = pace.due();
        pace.scanned(now, hinted(Found::Failed));
        assert!(pace.due() < now + REST, "a failed reading confirms nothing");
    }

    #[test]
    fn one_delayed_scan_does_not_stop_the_watch() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        pace.scanned(now, scan(300 * US, Found::Same, 1));
        pace.scanned(now + 30 * MS, scan(300 * MS, Found::Same, 1));
        assert_eq!(pace.due(), now + 30 * MS + 60 * MS);
        pace.scanned(now + 90 * MS, scan(300 * MS, Found::Same, 1));
        assert_eq!(pace.due(), now + 90 * MS + 30_000 * MS, "a cost measured twice in a row is charged");
    }

    #[test]
    fn a_debt_is_paid_off_over_several_scans() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..20 {
            pace.scanned(now, scan(3 * MS, Found::Change, 1));
            assert!(pace.due() <= now + 600 * MS, "a wait of {:?}", pace.due() - now);
            now = pace.due();
        }
    }

    proptest! {
        /// For any sequence of events, the scans of a namespace cost at most its share plus the credit.
        #[test]
        fn the_cost_stays_within_the_share(
            base in 1u32..2_500,
            steps in prop::collection::vec((0u32..1_000, 0usize..3, 0..3, any::<bool>()), 1..200),
            watched in 1usize..60,
        ) {
            let start = Instant::now();
            let (mut now, mut spent) = (start, Duration::ZERO);
            let mut pace = Pace::new(start);
            for (cost, found, asked, hinted) in steps {
                match asked {
                    0 => {}
                    1 => pace.hint(now),
                    _ => pace.hurry(now),
                }
                now = now.max(pace.due());
                // When a scan starts, the cost of all scans before it is paid off except for the credit.
                let share = (now - start + CREDIT) / (COST_FACTOR * u32::try_from(watched).unwrap());
                prop_assert!(spent <= share + US, "spent {spent:?} of {share:?}");
                // Less than twice the cost of the previous scan, so each scan is charged in full.
                let cost = base * US + base * US * cost / 1_000;
                spent += cost;
                now += cost;
                let found = [Found::Failed, Found::Same, Found::Change][found];
                pace.scanned(now, Scan { hinted, ..scan(cost, found, watched) });
            }
        }
    }
}
