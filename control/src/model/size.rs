//! A number of bytes, in the form that users write and read. Pure.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A text that is not a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a size is a number of bytes from 1, or a number with K, M, G or T behind it, such as 4G")]
pub struct SizeError;

/// The units above the byte, each 1,024 times the one before.
const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

impl FromStr for ByteSize {
    type Err = SizeError;

    /// Parses a size. `4G`, `4GiB` and `4gb` are equal: the units are binary, as in `docker run --memory`.
    fn from_str(text: &str) -> Result<ByteSize, SizeError> {
        let text = text.trim();
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim().to_ascii_lowercase();
        let letter = unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit);
        let shift = match letter {
            "" if unit != "ib" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(SizeError),
        };
        let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
        bytes.filter(|bytes| *bytes > 0).map(ByteSize).ok_or(SizeError)
    }
}

impl fmt::Display for ByteSize {
    /// Three digits and a binary unit, rounded down.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut tenths = u128::from(self.0) * 10 / 1024;
        let mut unit = 0;
        while tenths >= 10_240 && unit + 1 < UNITS.len() {
            tenths /= 1024;
            unit += 1;
        }
        let name = UNITS.get(unit).copied().unwrap_or_default();
        if tenths < 1_000 {
            write!(f, "{}.{} {name}", tenths / 10, tenths % 10)
        } else {
            write!(f, "{} {name}", tenths / 10)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_shown_with_three_digits_and_a_unit() {
        let all = [0, 1023, 1024, 1536, 102_400, 1_048_575, 1_048_576, 1 << 40, u64::MAX];
        let shown =
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "100 KiB", "1023 KiB", "1.0 MiB", "1.0 TiB", "15.9 EiB"];
        assert_eq!(all.map(|bytes| ByteSize(bytes).to_string()), shown);
    }

    #[test]
    fn size_is_parsed_with_or_without_a_binary_unit() {
        let size = |text: &str| text.parse::<ByteSize>().map(|size| size.0);
        for (text, bytes) in
            [("1", 1), ("512b", 512), ("2K", 2048), ("3 MiB", 3 << 20), ("4gb", 4 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "0G", "G", "1.5G", "-1", "4X", "4iB", "1KK", "99999999999T"] {
            assert_eq!(size(text), Err(SizeError), "{text}");
        }
    }
}
