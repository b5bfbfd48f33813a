//! The user's approvals of files in a folder that widen what may happen on the host. Pure.
//!
//! A container can often write to its folder, and a cloned folder holds other people's text. A file there has an effect
//! on the host only after the user approved exactly its bytes (`landfall trust`). An approval has three parts: the
//! canonical path of the folder, the file's path in the folder, and the SHA-256 of the file's content. A file has at
//! most one approval: a new one replaces it, so an older version of the file does not become valid again.
//!
//! All approvals of a user are one JSON document, `trust.json` in the daemon's home ([`crate::registry::trust_file`]):
//!
//! ```json
//! {"formatVersion":1,"folders":{"/home/u/shop":{"files":{"landfall.toml":{"sha256":"9f86…","approvedAt":"2026-…"}}}}}
//! ```
//!
//! [`Trust::approves`] is the whole decision. Fields and files that this release does not know are kept. A release that
//! changes the meaning of a known field increases `formatVersion`; this one then approves nothing and does not change
//! the document.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::model::name::hex;

/// The newest version of the format that this release knows.
const FORMAT_VERSION: u64 = 1;
/// The length of a SHA-256 in bytes.
const DIGEST_BYTES: usize = 32;

/// A file of a folder that needs an approval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FolderFile {
    /// Commands, secrets and requests for tools.
    #[serde(rename = "landfall.toml")]
    Settings,
    /// Ports below 1024.
    #[serde(rename = ".devcontainer/devcontainer.json")]
    Devcontainer,
    /// The same file at its other path.
    #[serde(rename = ".devcontainer.json")]
    DevcontainerAtTop,
}

impl FolderFile {
    /// Its path, relative to the folder.
    pub const fn path(self) -> &'static str {
        match self {
            FolderFile::Settings => "landfall.toml",
            FolderFile::Devcontainer => ".devcontainer/devcontainer.json",
            FolderFile::DevcontainerAtTop => ".devcontainer.json",
        }
    }
}

impl fmt::Display for FolderFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.path())
    }
}

/// The SHA-256 of a file's content. Its text is 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContentDigest([u8; DIGEST_BYTES]);

impl ContentDigest {
    /// Hashes the content of a file.
    pub fn of(content: &[u8]) -> ContentDigest {
        ContentDigest(Sha256::digest(content).into())
    }

    fn parse(text: &str) -> Option<ContentDigest> {
        let is_digit = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        if text.len() != 2 * DIGEST_BYTES || !text.as_bytes().iter().all(is_digit) {
            return None;
        }
        let mut bytes = [0; DIGEST_BYTES];
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
        }
        Some(ContentDigest(bytes))
    }
}

impl fmt::Display for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl Serialize for ContentDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ContentDigest {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<ContentDigest, D::Error> {
        let text = String::deserialize(from)?;
        ContentDigest::parse(&text).ok_or_else(|| D::Error::custom("sha256 is not 64 hexadecimal digits"))
    }
}

/// The reason that a document holds no approvals.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TrustFormatError {
    /// The content is not JSON.
    #[error("it is not JSON: {0}")]
    NotJson(String),
    /// The JSON is not a document of approvals.
    #[error("it does not hold approvals: {0}")]
    Mismatch(String),
    /// A newer release wrote it.
    #[error("formatVersion {0} is of a newer release")]
    Newer(Value),
}

/// All approvals of a user.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trust {
    format_version: u64,
    #[serde(default)]
    folders: BTreeMap<String, TrustedFolder>,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct TrustedFolder {
    #[serde(default)]
    files: BTreeMap<String, Approval>,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

/// The approval of one file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Approval {
    /// The content that was approved.
    pub sha256: ContentDigest,
    /// The time of the approval (RFC 3339), for display.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_at: Option<String>,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

impl Default for Trust {
    /// No approvals.
    fn default() -> Trust {
        Trust { format_version: FORMAT_VERSION, folders: BTreeMap::new(), unknown: Map::new() }
    }
}

impl Trust {
    /// Parses a document.
    ///
    /// # Errors
    /// [`TrustFormatError`]. The caller then has no approval at all.
    pub fn parse(content: &[u8]) -> Result<Trust, TrustFormatError> {
        let value: Value =
            serde_json::from_slice(content).map_err(|error| TrustFormatError::NotJson(error.to_string()))?;
        match value.get("formatVersion") {
            Some(version) if version.as_u64().is_some_and(|version| version <= FORMAT_VERSION) => {}
            Some(version @ Value::Number(_)) => return Err(TrustFormatError::Newer(version.clone())),
            _ => return Err(TrustFormatError::Mismatch("formatVersion is missing".to_owned())),
        }
        serde_json::from_value(value).map_err(|error| TrustFormatError::Mismatch(error.to_string()))
    }

    /// The document as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Maps with string keys always serialise.
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Whether the user approved this content of this file. `folder` is canonical: absolute, every link resolved.
    pub fn approves(&self, folder: &Path, file: FolderFile, content: &ContentDigest) -> bool {
        self.approval(folder, file).is_some_and(|approval| approval.sha256 == *content)
    }

    /// The approval of a file, whatever its present content.
    pub fn approval(&self, folder: &Path, file: FolderFile) -> Option<&Approval> {
        self.folders.get(folder.to_str()?)?.files.get(file.path())
    }

    /// Approves this content of a file, and no other content of it. `folder` is canonical.
    pub fn approve(&mut self, folder: &str, file: FolderFile, content: ContentDigest, at: String) {
        let files = &mut self.folders.entry(folder.to_owned()).or_default().files;
        let unknown = files.remove(file.path()).map(|before| before.unknown).unwrap_or_default();
        let approval = Approval { sha256: content, approved_at: Some(at), unknown };
        files.insert(file.path().to_owned(), approval);
    }

    /// Removes every approval of a folder. Returns whether there was one.
    pub fn revoke(&mut self, folder: &str) -> bool {
        self.folders.remove(folder).is_some()
    }

    /// Every approval, by folder: the folder, the file's path in it, and the approval.
    pub fn approvals(&self) -> impl Iterator<Item = (&str, &str, &Approval)> {
        self.folders.iter().flat_map(|(folder, entry)| {
            entry.files.iter().map(move |(file, approval)| (folder.as_str(), file.as_str(), approval))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const SHOP: &str = "/home/u/shop";

    fn approved(folder: &str, content: &[u8]) -> Trust {
        let mut trust = Trust::default();
        trust.approve(
            folder,
            FolderFile::Settings,
            ContentDigest::of(content),
            "2026-01-01T00:00:00Z".to_owned(),
        );
        trust
    }

    fn approves(trust: &Trust, folder: &str, file: FolderFile, content: &[u8]) -> bool {
        trust.approves(Path::new(folder), file, &ContentDigest::of(content))
    }

    #[test]
    fn approval_covers_one_folder_one_file_and_one_content() {
        let trust = approved(SHOP, b"a");
        assert!(approves(&trust, SHOP, FolderFile::Settings, b"a"));
        assert!(!approves(&trust, SHOP, FolderFile::Settings, b"a\n"));
        assert!(!approves(&trust, SHOP, FolderFile::Devcontainer, b"a"));
        for folder in ["/home/u", "/home/u/shop/", "/home/u/shop/sub", "/home/u/shop2", ""] {
            assert_eq!(approves(&trust, folder, FolderFile::Settings, b"a"), folder == SHOP, "{folder}");
        }
        assert!(!approves(&Trust::default(), SHOP, FolderFile::Settings, b"a"));
    }

    #[test]
    fn new_approval_replaces_the_old_one() {
        let mut trust = approved(SHOP, b"a");
        trust.approve(SHOP, FolderFile::Settings, ContentDigest::of(b"b"), String::new());
        assert!(approves(&trust, SHOP, FolderFile::Settings, b"b"));
        assert!(!approves(&trust, SHOP, FolderFile::Settings, b"a"));
        trust.approve(SHOP, FolderFile::Devcontainer, ContentDigest::of(b"c"), String::new());
        assert_eq!(trust.approvals().count(), 2);
        assert!(trust.revoke(SHOP) && !trust.revoke(SHOP));
        assert!(!approves(&trust, SHOP, FolderFile::Settings, b"b"));
    }

    #[test]
    fn document_round_trips_with_unknown_fields() {
        let sha256 = ContentDigest::of(b"a").to_string();
        let document = json!({
            "formatVersion": 1, "new": 7,
            "folders": {SHOP: {"reach": [5432], "files": {
                "landfall.toml": {"sha256": sha256, "approvedAt": "t", "by": "u"},
                "compose.yaml": {"sha256": sha256}
            }}}
        });
        let mut trust = Trust::parse(document.to_string().as_bytes()).unwrap();
        assert!(approves(&trust, SHOP, FolderFile::Settings, b"a"));
        let written = |trust: &Trust| serde_json::from_slice::<Value>(&trust.to_bytes()).unwrap();
        assert_eq!(written(&trust), document);
        trust.approve(SHOP, FolderFile::Settings, ContentDigest::of(b"b"), "later".to_owned());
        let mut changed = document;
        changed["folders"][SHOP]["files"]["landfall.toml"] =
            json!({"sha256": ContentDigest::of(b"b").to_string(), "approvedAt": "later", "by": "u"});
        assert_eq!(written(&trust), changed);
    }

    #[test]
    fn invalid_document_is_an_error() {
        let is_newer = |text: &str| matches!(Trust::parse(text.as_bytes()), Err(TrustFormatError::Newer(_)));
        assert!(is_newer(r#"{"formatVersion":2,"folders":7}"#) && is_newer(r#"{"formatVersion":1.5}"#));
        let digest = "0".repeat(64);
        let with = |sha256: &str| {
            format!(
                r#"{{"formatVersion":1,"folders":{{"/a":{{"files":{{"landfall.toml":{{"sha256":"{sha256}"}}}}}}}}}}"#
            )
        };
        assert!(Trust::parse(with(&digest).as_bytes()).is_ok());
        for text in [
            "",
            "{",
            "[]",
            "null",
            "{}",
            r#"{"formatVersion":"1"}"#,
            r#"{"formatVersion":null}"#,
            r#"{"formatVersion":1,"folders":[]}"#,
            r#"{"formatVersion":1,"folders":{"/a":7}}"#,
            &with(&digest[1..]),
            &with(&digest.replace('0', "A")),
            &with(""),
            &with(&digest.replacen('0', "é", 1)),
        ] {
            let error = Trust::parse(text.as_bytes()).unwrap_err();
            assert!(!matches!(error, TrustFormatError::Newer(_)), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_rejected(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = Trust::parse(&bytes);
        }

        #[test]
        fn digest_round_trips(content in proptest::collection::vec(any::<u8>(), 0..64)) {
            let digest = ContentDigest::of(&content);
            prop_assert_eq!(ContentDigest::parse(&digest.to_string()), Some(digest));
        }
    }
}
