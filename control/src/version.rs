//! Which build this is: what a client compares with the daemon's answer to `version`, and a daemon with its engine's.

/// SHA-256 over the sources, first 32 hex digits; made when the program was built.
pub const FINGERPRINT: &str = env!("LANDFALL_FINGERPRINT");

/// What a build without a fingerprint says (wire specification, A.8). It equals every other one.
pub const UNVERSIONED: &str = "unversioned";

/// Names a version to report and to expect, in place of the fingerprint: `unversioned` lets the reference's clients,
/// when they know no version of their own, live with this daemon.
pub const VARIABLE: &str = "LANDFALL_VERSION";

/// The version that this process reports and expects.
pub fn current() -> String {
    match std::env::var(VARIABLE) {
        Ok(version) if !version.is_empty() => version,
        _ => FINGERPRINT.to_owned(),
    }
}

/// Whether a daemon of version `running` is the one that a client of version `expected` wants.
pub fn fits(running: &str, expected: &str) -> bool {
    running == expected || running == UNVERSIONED || expected == UNVERSIONED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_is_thirty_two_hex_digits() {
        assert_eq!(FINGERPRINT.len(), 32);
        assert!(FINGERPRINT.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }

    #[test]
    fn an_unversioned_build_fits_every_other_one() {
        assert!(fits("a", "a") && fits(UNVERSIONED, "a") && fits("a", UNVERSIONED));
        assert!(!fits("a", "b"));
    }
}
