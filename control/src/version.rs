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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_is_thirty_two_hex_digits() {
        assert_eq!(FINGERPRINT.len(), 32);
        assert!(FINGERPRINT.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
}
