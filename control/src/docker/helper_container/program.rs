//! This program as the content of the helper's image: whether it runs without other files, and the identifier of its build.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::model::name::hex;
use crate::version;

/// The file of this program, also after it was renamed or deleted.
const OWN: &str = "/proc/self/exe";
/// The number of bytes to read: the headers are at the start of the file.
const HEAD_BYTES: u64 = 64 * 1024;
/// The length of a build identifier, in characters.
const BUILD_CHARS: usize = 16;
/// The kind of program header that names the dynamic loader (`PT_INTERP`, elf(5)).
const INTERPRETER: u32 = 3;

/// The reasons why the program cannot run in an image without other files.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// Its file cannot be read.
    #[error("this program's own file cannot be read")]
    Unreadable(#[from] io::Error),
    /// It needs shared libraries, which the image does not contain.
    #[error("this landfall needs the system's shared libraries, which the helper's image does not contain")]
    Dynamic,
}

impl ProgramError {
    /// Returns the remedy.
    pub fn hint(&self) -> &'static str {
        match self {
            ProgramError::Unreadable(_) => "check that /proc is mounted",
            ProgramError::Dynamic => {
                "use a static build: RUSTFLAGS=\"-C target-feature=+crt-static\" cargo build --release -p landfall --target \
                 TRIPLE, with the TRIPLE that rustc -vV calls host"
            }
        }
    }
}

/// A program that runs in an image without other files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The path of its file.
    pub path: PathBuf,
    /// The identifier of its build. Two builds of the same sources differ.
    pub build: String,
}

impl Program {
    /// Returns this program.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn own() -> Result<Program, ProgramError> {
        Program::at(Path::new(OWN))
    }

    fn at(path: &Path) -> Result<Program, ProgramError> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let mut head = Vec::new();
        file.take(HEAD_BYTES).read_to_end(&mut head)?;
        if !is_static(&head) {
            return Err(ProgramError::Dynamic);
        }
        let named = format!(
            "{}\n{}\n{}.{:09}",
            version::FINGERPRINT,
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec()
        );
        let mut build = hex(&Sha256::digest(named.as_bytes()));
        build.truncate(BUILD_CHARS);
        Ok(Program { path: path.to_owned(), build })
    }
}

/// Returns whether a program with this head needs no dynamic loader: a 64-bit ELF file of this machine's byte order, without
/// a program header of type `PT_INTERP` (elf(5)).
fn is_static(head: &[u8]) -> bool {
    const SIXTY_FOUR_BITS: u8 = 2;
    let number = |at: usize, bytes: usize| -> Option<u64> {
        let mut number = [0; 8];
        let slice = head.get(at..at.checked_add(bytes)?)?;
        if cfg!(target_endian = "little") {
            number[..bytes].copy_from_slice(slice);
        } else {
            number[8 - bytes..].copy_from_slice(slice);
        }
        Some(u64::from_ne_bytes(number))
    };
    let kinds = || -> Option<Vec<u64>> {
        let (table, each, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let at = |index: u64| usize::try_from(table.checked_add(index.checked_mul(each)?)?).ok();
        (0..count).map(|index| number(at(index)?, 4)).collect()
    };
    head.starts_with(b"\x7fELF")
        && head.get(4) == Some(&SIXTY_FOUR_BITS)
        && kinds().is_some_and(|kinds| !kinds.is_empty() && !kinds.contains(&u64::from(INTERPRETER)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the head of a program with program headers of these types.
    fn head(kinds: &[u32]) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..5].copy_from_slice(b"\x7fELF\x02");
        head[32..40].copy_from_slice(&64_u64.to_ne_bytes());
        head[54..56].copy_from_slice(&56_u16.to_ne_bytes());
        head[56..58].copy_from_slice(&u16::try_from(kinds.len()).unwrap().to_ne_bytes());
        for kind in kinds {
            let mut header = [0; 56];
            header[..4].copy_from_slice(&kind.to_ne_bytes());
            head.extend(header);
        }
        head
    }

    #[test]
    fn a_program_without_a_loader_is_static() {
        assert!(is_static(&head(&[6, 1, 1, 2])));
        assert!(!is_static(&head(&[6, INTERPRETER, 1])));
    }

    #[test]
    fn a_file_that_is_not_a_complete_program_is_not_static() {
        let whole = head(&[1, 1]);
        for length in [0, 4, 20, 60, 64, whole.len() - 56] {
            assert!(!is_static(&whole[..length]), "{length} bytes");
        }
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(&head(&[])));
        let mut far = whole;
        far[32..40].copy_from_slice(&u64::MAX.to_ne_bytes());
        assert!(!is_static(&far));
    }

    #[test]
    fn a_different_file_is_a_different_build() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        let built = |bytes: Vec<u8>| {
            std::fs::write(&path, bytes).unwrap();
            Program::at(&path).unwrap().build
        };
        let (one, other) = (built(head(&[1])), built(head(&[1, 1])));
        assert_eq!(one.len(), BUILD_CHARS);
        assert_ne!(one, other);
        assert!(matches!(Program::at(Path::new("/no/such/file")), Err(ProgramError::Unreadable(_))));
    }
}
