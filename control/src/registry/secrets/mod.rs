//! Secrets in a registered folder: `secrets-patch` replaces one named object inside one JSON file, under the lock that the
//! file's other writers take, at once or not at all (wire specification, A.1.4).
//!
//! - `patch` decides what is replaced by what (pure).
//! - `tree` is JSON that keeps the order of everything else (pure).
//! - `file` does it, in a folder that the container can write to and is not trusted with.
//!
//! Which file and which names is configuration ([`SecretsConfig`], `[secrets]` in the folder's `landfall.toml`); the
//! reference's list is the default. What is in the
//! blocks is in no error and no log: errors name fields, never values.

pub mod file;
pub mod patch;
pub mod tree;

use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

use file::{Attempt, Holder};

use crate::registry::folder::Secrets;

/// How often a lock that somebody holds is tried again.
const RETRIES_MAX: u32 = 10;
/// The delay before the first of these tries; it doubles from one to the next.
const DELAY_MIN: Duration = Duration::from_millis(100);
/// The longest delay.
const DELAY_MAX: Duration = Duration::from_secs(10);

/// Which file secrets are in, and which objects of it may be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretsConfig {
    /// The file's name, directly in the registered folder.
    pub file: String,
    /// The names below `channels`.
    pub keys: Keys,
}

/// The names that may be replaced; the first one of a patch counts, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// The reference's, each with its own fields.
    Reference,
    /// These, with whatever object.
    Free(Vec<String>),
}

impl Default for SecretsConfig {
    fn default() -> SecretsConfig {
        SecretsConfig { file: "secrets.json".to_owned(), keys: Keys::Reference }
    }
}

impl From<Secrets> for SecretsConfig {
    fn from(configured: Secrets) -> SecretsConfig {
        // A name that is not UTF-8 becomes one that no file has.
        let file = configured.file.to_string_lossy().into_owned();
        SecretsConfig { file, keys: Keys::Free(configured.keys) }
    }
}

/// Why secrets were not replaced.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SecretsError {
    /// The patch does not fit.
    #[error("{0}")]
    Invalid(String),
    /// The file could not be read, locked or written.
    #[error("{0}")]
    Storage(String),
}

/// Replaces in the secrets of `folder` what `patch` names. Waits for the lock as long as that is promised.
///
/// # Errors
/// [`SecretsError`]; the file is then as it was.
pub async fn replace(folder: &Path, config: &SecretsConfig, patch: &Value) -> Result<(), SecretsError> {
    let replacement = patch::read(&config.keys, patch).map_err(SecretsError::Invalid)?;
    for retry in 0..=RETRIES_MAX {
        let (folder, file, replacement) = (folder.to_owned(), config.file.clone(), replacement.clone());
        let attempt = move || file::attempt(&folder, &file, &replacement, &Holder::default());
        match tokio::task::spawn_blocking(attempt).await {
            Ok(Ok(Attempt::Done)) => return Ok(()),
            Ok(Ok(Attempt::Locked)) if retry < RETRIES_MAX => {
                tokio::time::sleep(delay(retry, random())).await;
            }
            Ok(Ok(Attempt::Locked)) => {}
            Ok(Err(error)) => return Err(SecretsError::Storage(error)),
            Err(error) => return Err(SecretsError::Storage(error.to_string())),
        }
    }
    Err(SecretsError::Storage(format!("{0} is locked: another program holds {0}.lock", config.file)))
}

/// How long to wait before a further try. `random` (below 1) spreads those who wait for the same lock.
fn delay(retry: u32, random: f64) -> Duration {
    DELAY_MIN.saturating_mul(2_u32.saturating_pow(retry)).mul_f64(1.0 + random).min(DELAY_MAX)
}

/// A number below 1, different each time; good enough to spread waiting.
fn random() -> f64 {
    let [one, two, ..] = RandomState::new().hash_one(0_u8).to_le_bytes();
    f64::from(u16::from_le_bytes([one, two])) / 65_536.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn a_lock_is_waited_for_until_it_is_free_and_not_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let lock = folder.path().join("secrets.json.lock");
        let (config, patch) = (SecretsConfig::default(), json!({"mcp": {"server": "s", "credential": {}}}));
        std::fs::create_dir(&lock).unwrap();
        let begun = Instant::now();
        let error = replace(folder.path(), &config, &patch).await.unwrap_err();
        let text = "secrets.json is locked: another program holds secrets.json.lock";
        assert_eq!(error, SecretsError::Storage(text.to_owned()));
        // Ten delays, each of them spread over up to twice its length.
        let waited = begun.elapsed().as_secs_f64();
        assert!((42.7..60.1).contains(&waited), "{waited}");
        // It is free again while somebody waits.
        let freed = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            std::fs::remove_dir(&lock).unwrap();
        };
        let (replaced, ()) = tokio::join!(replace(folder.path(), &config, &patch), freed);
        assert_eq!(replaced, Ok(()));
        let own = SecretsConfig { file: "own.json".to_owned(), keys: Keys::Free(vec!["k".to_owned()]) };
        replace(folder.path(), &own, &json!({"channels": {"k": {"v": 1}}})).await.unwrap();
        assert!(folder.path().join("own.json").exists());
    }

    #[test]
    fn delays_double_from_a_tenth_of_a_second_to_ten() {
        let delays: Vec<_> = (0..10).map(|retry| delay(retry, 0.0).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000, 10_000]);
        assert_eq!(delay(0, 0.5).as_millis(), 150);
        assert_eq!(delay(u32::MAX, 0.99), DELAY_MAX);
        let randoms: Vec<_> = (0..50).map(|_| random()).collect();
        assert!(randoms.iter().all(|random| (0.0..1.0).contains(random)));
        assert!(randoms.iter().any(|random| random.to_bits() != randoms[0].to_bits()));
    }
}
