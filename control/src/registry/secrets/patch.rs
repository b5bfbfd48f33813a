//! Parses a `secrets-patch` into the object and its replacement (wire specification, A.1.4). Pure.
//!
//! A patch names one object: the credential of one MCP server, which takes precedence, or the block of one channel. The
//! blocks of the reference's channels have defined fields; other members of a block are dropped. Error texts name fields,
//! and never contain values.

use serde_json::{Map, Value};

use super::Keys;
use super::tree::Tree;

/// The error of a patch of unknown form.
const INVALID: &str = "invalid secrets-patch";

/// The object to replace, and its new content.
#[derive(Clone, Debug, PartialEq)]
pub struct Replacement {
    /// `channels` or `mcp`.
    pub slice: &'static str,
    /// The name in the slice.
    pub key: String,
    /// The new object.
    pub block: Tree,
}

/// Parses a patch.
///
/// # Errors
/// The errors of the wire specification, joined with `; `.
pub fn read(keys: &Keys, patch: &Value) -> Result<Replacement, String> {
    let patch = patch.as_object().ok_or(INVALID)?;
    match patch.get("mcp") {
        Some(mcp) => read_mcp(mcp),
        None => read_channel(keys, patch.get("channels").and_then(Value::as_object).ok_or(INVALID)?),
    }
}

fn read_mcp(mcp: &Value) -> Result<Replacement, String> {
    let server = mcp.get("server").and_then(Value::as_str).filter(|server| !server.is_empty());
    let server = server.ok_or("mcp.server is required")?;
    let credential = mcp.get("credential").filter(|credential| credential.is_object());
    let credential = credential.ok_or("mcp.credential: expected an object")?;
    Ok(Replacement { slice: "mcp", key: server.to_owned(), block: credential.into() })
}

fn read_channel(keys: &Keys, channels: &Map<String, Value>) -> Result<Replacement, String> {
    let (key, block) = match keys {
        Keys::Reference => {
            let selected = BLOCKS.iter().find_map(|block| Some((block, channels.get(block.key)?)));
            let (block, value) = selected.ok_or(INVALID)?;
            (block.key, block.read(value)?)
        }
        Keys::Free(names) => {
            let selected = names.iter().find_map(|name| Some((name, channels.get(name)?)));
            let (name, value) = selected.ok_or(INVALID)?;
            let object = value.is_object().then(|| value.into());
            (name.as_str(), object.ok_or_else(|| format!("channels.{name}: expected an object"))?)
        }
    };
    Ok(Replacement { slice: "channels", key: key.to_owned(), block })
}

/// The type of a field.
enum Kind {
    Text,
    Number,
    OneOf(&'static [&'static str]),
    EncryptedPassword,
}

struct Field {
    name: &'static str,
    kind: Kind,
    required: bool,
}

struct Block {
    key: &'static str,
    record: &'static [Field],
    /// The fields of `pendingLogin`, for a block that may have it.
    pending_login: &'static [Field],
}

const fn text(name: &'static str) -> Field {
    Field { name, kind: Kind::Text, required: true }
}

const fn number(name: &'static str) -> Field {
    Field { name, kind: Kind::Number, required: true }
}

const fn one_of(name: &'static str, values: &'static [&'static str]) -> Field {
    Field { name, kind: Kind::OneOf(values), required: true }
}

const fn optional(field: Field) -> Field {
    Field { required: false, ..field }
}

const fn encrypted_password() -> Field {
    Field { name: "encryptedPassword", kind: Kind::EncryptedPassword, required: false }
}

/// The reference's blocks, in order of precedence.
static BLOCKS: [Block; 7] = [
    Block {
        key: "line",
        record: &[
            text("account_id"),
            text("auth_token"),
            one_of("device", &["DESKTOPWIN", "DESKTOPMAC", "ANDROID", "ANDROIDSECONDARY", "IOS", "IOSIPAD"]),
            optional(text("certificate")),
            optional(text("display_name")),
            text("created_at"),
            text("updated_at"),
        ],
        pending_login: &[],
    },
    Block {
        key: "instagram",
        record: &[
            text("account_id"),
            text("username"),
            optional(text("full_name")),
            optional(text("profile_pic_url")),
            optional(text("pk")),
            text("created_at"),
            text("updated_at"),
        ],
        pending_login: &[],
    },
    Block {
        key: "discord",
        record: &[
            text("account_id"),
            text("token"),
            optional(text("username")),
            text("created_at"),
            text("updated_at"),
        ],
        pending_login: &[],
    },
    Block {
        key: "webex",
        record: &[
            text("account_id"),
            text("access_token"),
            text("refresh_token"),
            number("expires_at"),
            optional(text("device_url")),
            optional(text("user_id")),
            optional(text("client_id")),
            optional(text("client_secret")),
            optional(text("email")),
            encrypted_password(),
            text("created_at"),
            text("updated_at"),
        ],
        pending_login: &[],
    },
    Block {
        key: "teams",
        record: &[
            text("account_id"),
            text("access_token"),
            one_of("account_type", &["work", "personal"]),
            optional(text("token_expires_at")),
            optional(one_of("region", &["amer", "emea", "apac"])),
            optional(text("user_name")),
            optional(text("aad_refresh_token")),
            optional(text("aad_client_id")),
            optional(text("aad_tenant_id")),
            text("created_at"),
            text("updated_at"),
        ],
        pending_login: &[],
    },
    Block {
        key: "slack",
        record: &[
            text("account_id"),
            text("token"),
            text("cookie"),
            text("workspace_id"),
            optional(text("workspace_name")),
            text("created_at"),
            text("updated_at"),
        ],
        pending_login: &[],
    },
    Block {
        key: "kakaotalk",
        record: &[
            text("account_id"),
            text("oauth_token"),
            text("user_id"),
            optional(text("refresh_token")),
            text("device_uuid"),
            one_of("device_type", &["pc", "tablet"]),
            optional(one_of("auth_method", &["login", "extract"])),
            optional(text("email")),
            encrypted_password(),
            text("created_at"),
            text("updated_at"),
        ],
        pending_login: &[
            text("device_uuid"),
            one_of("device_type", &["pc", "tablet"]),
            text("email"),
            text("created_at"),
        ],
    },
];

/// The text fields of an `encryptedPassword`.
const PASSWORD_TEXTS: [&str; 5] = ["kid", "iv", "ciphertext", "authTag", "createdAt"];

impl Block {
    fn read(&self, value: &Value) -> Result<Tree, String> {
        let mut wrong = Vec::new();
        let at = format!("channels.{}", self.key);
        let Some(block) = value.as_object() else { return Err(format!("{at}: expected an object")) };
        let mut members = Vec::new();
        match block.get("currentAccount") {
            Some(current @ (Value::String(_) | Value::Null)) => {
                members.push(("currentAccount".to_owned(), current.into()));
            }
            _ => wrong.push(format!("{at}.currentAccount: expected a string or null")),
        }
        match block.get("accounts").and_then(Value::as_object) {
            Some(accounts) => {
                let record = |(id, account): (&String, &Value)| {
                    (
                        id.clone(),
                        read_fields(self.record, account, &format!("{at}.accounts.{id}"), &mut wrong),
                    )
                };
                members.push(("accounts".to_owned(), Tree::Object(accounts.iter().map(record).collect())));
            }
            None => wrong.push(format!("{at}.accounts: expected an object")),
        }
        if let Some(pending) = block.get("pendingLogin").filter(|_| !self.pending_login.is_empty()) {
            let pending = read_fields(self.pending_login, pending, &format!("{at}.pendingLogin"), &mut wrong);
            members.push(("pendingLogin".to_owned(), pending));
        }
        if wrong.is_empty() { Ok(Tree::Object(members)) } else { Err(wrong.join("; ")) }
    }
}

/// Returns the known fields of an object, in the order of `fields`. Appends errors to `wrong`.
fn read_fields(fields: &[Field], value: &Value, at: &str, wrong: &mut Vec<String>) -> Tree {
    let Some(object) = value.as_object() else {
        wrong.push(format!("{at}: expected an object"));
        return Tree::Null;
    };
    let mut members = Vec::new();
    for field in fields {
        let at = format!("{at}.{}", field.name);
        match object.get(field.name) {
            None if field.required => wrong.push(format!("{at}: required")),
            None => {}
            Some(value) => match field.kind.error_of(value) {
                None => members.push((field.name.to_owned(), value.into())),
                Some(error_of) => wrong.push(format!("{at}: {error_of}")),
            },
        }
    }
    Tree::Object(members)
}

impl Kind {
    /// Returns the error of a value, if it is invalid.
    fn error_of(&self, value: &Value) -> Option<String> {
        match self {
            Kind::Text => (!value.is_string()).then(|| "expected a string".to_owned()),
            Kind::Number => (!value.is_number()).then(|| "expected a number".to_owned()),
            Kind::OneOf(values) => {
                let fits = value.as_str().is_some_and(|text| values.contains(&text));
                (!fits).then(|| format!("expected one of {}", values.join(", ")))
            }
            Kind::EncryptedPassword => password_complaint(value),
        }
    }
}

fn password_complaint(value: &Value) -> Option<String> {
    let Some(password) = value.as_object() else { return Some("expected an object".to_owned()) };
    if password.get("v").and_then(Value::as_f64) != Some(1.0) {
        return Some("v: expected 1".to_owned());
    }
    if password.get("alg").and_then(Value::as_str) != Some("AES-256-GCM") {
        return Some("alg: expected AES-256-GCM".to_owned());
    }
    let missing = PASSWORD_TEXTS.iter().find(|name| !password.get(**name).is_some_and(Value::is_string));
    if let Some(name) = missing {
        return Some(format!("{name}: expected a string"));
    }
    let has_unknown = password.len() > PASSWORD_TEXTS.len() + 2;
    has_unknown.then(|| "it has fields that are not known".to_owned())
}

#[cfg(test)]
#[path = "patch_tests.rs"]
mod tests;
