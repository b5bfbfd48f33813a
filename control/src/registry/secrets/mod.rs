//! Secrets in a registered folder: `secrets-patch` replaces one named object in one JSON file, atomically and under the lock
//! that other writers of the file use (wire specification, A.1.4).
//!
//! - `patch` determines the object and its replacement. Pure.
//! - `tree` represents JSON and keeps the order of all members. Pure.
//! - `file` replaces the file, in a folder that the container can write to and that is therefore not trusted.
//!
//! The file and the names are configured ([`SecretsConfig`], `[secrets]` in the folder's `landfall.toml`); the default is
//! the reference's list. Errors and logs name fields, and never contain values.

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

/// The number of retries for a lock that another program holds.
const RETRIES_MAX: u32 = 10;
/// The delay before the first retry; it doubles with each retry.
const DELAY_MIN: Duration = Duration::from_millis(100);
/// The longest delay.
const DELAY_MAX: Duration = Duration::from_secs(10);

/// The file of the secrets, and the objects in it that may be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretsConfig {
    /// The name of the file, directly in the registered folder.
    pub file: String,
    /// The names below `channels`.
    pub keys: Keys,
}

/// The names that may be replaced. The first one of a patch, in this order, is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// The reference's names, each with its own fields.
    Reference,
    /// These names, with any object.
    Free(Vec<String>),
}

impl Default for SecretsConfig {
    fn default() -> SecretsConfig {
        SecretsConfig { file: "secrets.json".to_owned(), keys: Keys::Reference }
    }
}

impl From<Secrets> for SecretsConfig {
    fn from(configured: Secrets) -> SecretsConfig {
        // A name that is not UTF-8 becomes a name that no file has.
        let file = configured.file.to_string_lossy().into_owned();
        SecretsConfig { file, keys: Keys::Free(configured.keys) }
    }
}

/// The reasons why secrets are not replaced.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SecretsError {
    /// The patch is invalid.
    #[error("{0}")]
    Invalid(String),
    /// The file could not be read, locked or written.
    #[error("{0}")]
    Storage(String),
}

/// Replaces an object in the secrets of `folder`. Waits for the lock with up to ten retries.
///
/// # Errors
/// [`SecretsError`]; the file is then unchanged.
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

/// Returns the delay before a retry. `random` (below 1) spreads callers that wait for the same lock.
fn delay(retry: u32, random: f64) -> Duration {
    DELAY_MIN.saturating_mul(2_u32.saturating_pow(retry)).mul_f64(1.0 + random).min(DELAY_MAX)
}

/// Returns a number below 1 that differs with each call; sufficient to spread delays.
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
    async fn a_lock_is_waited_for_with_a_bound() {
        let folder = tempfile::tempdir().unwrap();
        let lock = folder.path().join("secrets.json.lock");
        let (config, patch) = (SecretsConfig::default(), json!({"mcp": {"server": "s", "credential": {}}}));
        std::fs::create_dir(&lock).unwrap();
        let started = Instant::now();
        let error = replace(folder.path(), &config, &patch).await.unwrap_err();
        let text = "secrets.json is locked: another program holds secrets.json.lock";
        assert_eq!(error, SecretsError::Storage(text.to_owned()));
        // Ten delays, each multiplied by a factor from 1 to 2.
        let waited = started.elapsed().as_secs_f64();
        assert!((42.7..60.1).contains(&waited), "{waited}");
        // The lock is released during the wait.
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
