//! Bytes whose value shows their position, and the random numbers behind every choice of a case.
//!
//! A [`Pattern`] is a function from position to byte. So a receiver checks each slice as it arrives, without storing it, and
//! reports the first wrong byte. That detects errors which a length or a checksum would miss: two slices in the wrong order,
//! a duplicate, a gap.
//!
//! A separate package, so that it is optimised in debug builds and the tests are not.
#![expect(clippy::unwrap_used, reason = "for tests: what surprises it fails the test")]

/// An endless stream of bytes, determined by a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    seed: u64,
}

impl Pattern {
    /// Returns the stream of this seed. The streams of two seeds differ in nearly every byte.
    pub fn new(seed: u64) -> Pattern {
        Pattern { seed }
    }

    /// Fills `buffer` with the bytes that start at `position`.
    pub fn fill(self, position: u64, buffer: &mut [u8]) {
        let mut position = position;
        let mut rest = buffer;
        while !rest.is_empty() {
            let word = mix(self.seed ^ mix(position / 8)).to_le_bytes();
            let word = &word[usize::try_from(position % 8).unwrap()..];
            let count = word.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&word[..count]);
            position += count as u64;
            rest = later;
        }
    }

    /// Returns the first `count` bytes.
    pub fn bytes(self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fill(0, &mut bytes);
        bytes
    }

    /// Returns a checker for this stream, from its first byte.
    pub fn checker(self) -> Checker {
        Checker { pattern: self, position: 0, expected: Vec::new() }
    }
}

/// Checks a stream slice by slice.
#[derive(Debug)]
pub struct Checker {
    pattern: Pattern,
    position: u64,
    expected: Vec<u8>,
}

impl Checker {
    /// Checks the next bytes.
    ///
    /// # Panics
    /// If a byte differs from the pattern at its position.
    #[track_caller]
    pub fn check(&mut self, received: &[u8]) {
        self.expected.resize(received.len(), 0);
        self.pattern.fill(self.position, &mut self.expected);
        if received != self.expected {
            let at = received.iter().zip(&self.expected).position(|(have, want)| have != want).unwrap();
            panic!(
                "byte {} of stream {:#x} is {:#04x} instead of {:#04x}",
                self.position + at as u64,
                self.pattern.seed,
                received[at],
                self.expected[at],
            );
        }
        self.position += received.len() as u64;
    }

    /// The number of bytes checked, all of them right.
    pub fn position(&self) -> u64 {
        self.position
    }
}

/// Seeded random numbers (SplitMix64): the same choices for the same seed.
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// Returns the sequence of this seed.
    pub fn new(seed: u64) -> Rng {
        Rng { state: mix(seed) }
    }

    /// Returns the next number.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// Returns a number below `bound`, or 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound.max(1)
    }

    /// Returns true with a probability of 1 in `times`.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Returns a length below `bound` bytes; small lengths are as likely as large ones.
    pub fn length(&mut self, bound: usize) -> usize {
        let bits = u64::from(bound.max(2).ilog2()) + 1;
        let magnitude = 1_u64 << self.below(bits);
        usize::try_from(self.below(magnitude * 2)).unwrap().min(bound)
    }
}

/// The output function of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input affects every bit of the output.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_independent_of_its_slices() {
        let whole = Pattern::new(7).bytes(1000);
        for cut in [1, 7, 8, 13, 500] {
            let mut checker = Pattern::new(7).checker();
            whole.chunks(cut).for_each(|chunk| checker.check(chunk));
            assert_eq!(checker.position(), 1000);
        }
    }

    #[test]
    #[should_panic(expected = "byte 101 of stream 0x7")]
    fn the_first_wrong_byte_is_reported() {
        let mut bytes = Pattern::new(7).bytes(200);
        bytes[101] ^= 1;
        let mut checker = Pattern::new(7).checker();
        checker.check(&bytes[..64]);
        checker.check(&bytes[64..]);
    }

    #[test]
    #[should_panic(expected = "byte 64 of")]
    fn a_duplicate_slice_is_detected() {
        let bytes = Pattern::new(7).bytes(64);
        let mut checker = Pattern::new(7).checker();
        checker.check(&bytes);
        checker.check(&bytes);
    }
}
