//! Computes the fingerprint of the build: SHA-256 over the program's sources.
//!
//! Two builds of the same sources have the same version, so a client replaces a running daemon exactly when the sources
//! differ (wire specification, A.8). The specification defines the input of the hash: sorted relative paths, each followed
//! by NUL, the bytes, and NUL; the result is the first 32 hex digits.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

fn main() -> io::Result<()> {
    let workspace = Path::new("..");
    let mut files = Vec::new();
    for root in ["control/src", "engine/src"] {
        println!("cargo::rerun-if-changed=../{root}");
        gather(&workspace.join(root), &mut files)?;
    }
    for file in ["Cargo.lock", "control/Cargo.toml", "engine/Cargo.toml"] {
        println!("cargo::rerun-if-changed=../{file}");
        let path = workspace.join(file);
        if path.exists() {
            files.push(path);
        }
    }
    files.sort();
    let mut digest = Sha256::new();
    for file in files {
        let name = file.strip_prefix(workspace).unwrap_or(&file).to_string_lossy().replace('\\', "/");
        digest.update(name.as_bytes());
        digest.update([0]);
        digest.update(fs::read(&file)?);
        digest.update([0]);
    }
    let fingerprint: String = digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    println!("cargo::rustc-env=LANDFALL_FINGERPRINT={fingerprint}");
    Ok(())
}

/// Collects every Rust file below `folder` that is not a test.
fn gather(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            gather(&path, files)?;
        } else if name.ends_with(".rs") && name != "tests.rs" && !name.ends_with("_tests.rs") {
            files.push(path);
        }
    }
    Ok(())
}
