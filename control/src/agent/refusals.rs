//! The limit of log lines about refused hosts: ten per minute for each address. Pure: the time is an argument.
//!
//! Without it, a program that connects with a wrong token in a loop would fill the disk of the log collector.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// The window, and the maximum of lines per address in it.
const WINDOW: Duration = Duration::from_secs(60);
const LINES_MAX: u32 = 10;
/// The maximum of addresses that are counted separately. All others share one count.
const ADDRESSES_MAX: usize = 256;
/// The key of all other addresses.
const OTHERS: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// The counts of the current windows.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    windows: HashMap<IpAddr, Window>,
}

#[derive(Debug)]
struct Window {
    started: Instant,
    lines: u32,
}

impl Refusals {
    /// Counts a refusal, and returns whether it is logged.
    pub(super) fn admit(&mut self, address: IpAddr, now: Instant) -> bool {
        if self.windows.len() >= ADDRESSES_MAX && !self.windows.contains_key(&address) {
            self.windows.retain(|_, window| now.duration_since(window.started) < WINDOW);
        }
        let has_room = self.windows.len() < ADDRESSES_MAX || self.windows.contains_key(&address);
        let address = if has_room { address } else { OTHERS };
        let window = self.windows.entry(address).or_insert(Window { started: now, lines: 0 });
        if now.duration_since(window.started) >= WINDOW {
            *window = Window { started: now, lines: 0 };
        }
        window.lines = window.lines.saturating_add(1);
        window.lines <= LINES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn ten_lines_a_minute_are_logged_for_each_address() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let admitted = |refusals: &mut Refusals, number, at| {
            (0..100).filter(|_| refusals.admit(address(number), start + at)).count()
        };
        assert_eq!(admitted(&mut refusals, 1, Duration::ZERO), 10);
        assert_eq!(admitted(&mut refusals, 2, Duration::ZERO), 10);
        assert_eq!(admitted(&mut refusals, 1, WINDOW - Duration::from_millis(1)), 0);
        assert_eq!(admitted(&mut refusals, 1, WINDOW), 10);
    }

    #[test]
    fn memory_and_lines_are_bounded_for_any_number_of_addresses() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let lines = (0..100_000).filter(|number| refusals.admit(address(*number), start)).count();
        assert_eq!(lines, ADDRESSES_MAX + 10);
        assert_eq!(refusals.windows.len(), ADDRESSES_MAX + 1);
        assert!(refusals.admit(address(7_000_000), start + WINDOW));
        assert_eq!(refusals.windows.len(), 1);
    }
}
