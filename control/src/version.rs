//! The version of this build. A client compares it with the daemon's answer to `version`, and a daemon with its engine's.

/// SHA-256 over the sources, the first 32 hex digits, computed at build time.
pub const FINGERPRINT: &str = env!("LANDFALL_FINGERPRINT");

/// The version of a build without a fingerprint (wire specification, A.8). It fits every other version.
pub const UNVERSIONED: &str = "unversioned";

/// The environment variable that overrides the fingerprint as the version to report and to expect. With `unversioned`,
/// clients of the reference that have no version of their own accept this daemon.
pub const VARIABLE: &str = "LANDFALL_VERSION";

/// Returns the version that this process reports and expects.
pub fn current() -> String {
    match std::env::var(VARIABLE) {
        Ok(version) if !version.is_empty() => version,
        _ => FINGERPRINT.to_owned(),
    }
}

/// Whether a client that expects version `expected` accepts a daemon of version `running`.
pub fn fits(running: &str, expected: &str) -> bool {
    running == expected || running == UNVERSIONED || expected == UNVERSIONED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprint_is_32_hex_digits() {
        assert_eq!(FINGERPRINT.len(), 32);
        assert!(FINGERPRINT.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }

    #[test]
    fn unversioned_build_fits_every_other_one() {
        assert!(fits("a", "a") && fits(UNVERSIONED, "a") && fits("a", UNVERSIONED));
        assert!(!fits("a", "b"));
    }
}
