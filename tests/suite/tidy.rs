//! House rules that the compiler does not check, read from the sources.

use std::path::{Path, PathBuf};

use landfall_tests::case::Case;

pub(crate) const CASES: &[Case] = &[
    Case::once("tidy_no_leftover_markers", no_leftover_markers),
    Case::once("tidy_unsafe_only_in_listed_files", unsafe_only_in_listed_files),
    Case::once("tidy_pure_files_do_no_io", pure_files_do_no_io),
    Case::once("tidy_modules_import_downwards", modules_import_downwards),
    Case::once("tidy_files_are_short", files_are_short),
    Case::once("tidy_links_have_a_target", links_have_a_target),
];

/// The most lines of a source file; half of that is better.
const LINES_MAX: usize = 600;

/// The files that may contain `unsafe`.
const UNSAFE: [&str; 3] = ["engine/src/native/notify.rs", "engine/src/reactor/uring.rs", "engine/src/sys.rs"];

/// Directories that contain at least one pure file, whatever else moves.
const WITH_PURE_FILES: [&str; 5] = [
    "engine/src/relay/",
    "engine/src/watch/",
    "control/src/model/",
    "control/src/broker/",
    "control/src/forwarding/planner",
];

/// The modules of `control`, lowest first: each imports only modules that precede it.
const CONTROL_MODULES: [&str; 12] = [
    "error",
    "version",
    "model",
    "sys",
    "docker",
    "registry",
    "forwarding",
    "broker",
    "agent",
    "launch",
    "daemon",
    "cli",
];

/// Paths that a pure file does not use.
const IMPURE: [&str; 8] = [
    "std::fs",
    "std::io",
    "std::process",
    "std::thread",
    "std::net::Tcp",
    "std::net::Udp",
    "Instant::now",
    "SystemTime",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Returns every Rust source with its path from the root.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut directories: Vec<PathBuf> =
        ["engine", "control", "tests", "benches", "fuzz"].iter().map(|name| root().join(name)).collect();
    while let Some(directory) = directories.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                if !path.ends_with("target") && !path.ends_with("node_modules") {
                    directories.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(found.len() > 20, "only {} sources were found", found.len());
    found.sort();
    found
}

#[track_caller]
fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

/// Returns the lines of a source that `wanted` accepts, as `file:line: text`.
fn lines(name: &str, text: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    (1..)
        .zip(text.lines())
        .filter(|(_, line)| wanted(line))
        .map(|(number, line)| format!("{name}:{number}: {}", line.trim()))
        .collect()
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

fn no_leftover_markers() {
    // In two parts, so that this file does not match.
    let words = [["FIX", "ME"], ["XX", "X"], ["TO", "DO"], ["HA", "CK"]].map(|word| word.concat());
    let mut found = Vec::new();
    for (name, text) in sources() {
        found.extend(lines(&name, &text, |line| {
            line.split(|c: char| !c.is_ascii_alphabetic()).any(|word| words.iter().any(|left| left == word))
        }));
    }
    assert_none("left over", &found);
}

fn unsafe_only_in_listed_files() {
    let mut found = Vec::new();
    for (name, text) in sources() {
        if !UNSAFE.contains(&name.as_str()) {
            found.extend(lines(&name, &text, |line| {
                !is_comment(line)
                    && ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
                        .iter()
                        .any(|word| line.contains(word) && !line.contains('"'))
            }));
        }
    }
    assert_none("unsafe where it may not be", &found);
}

/// Returns whether a file's documentation marks it as pure: "Pure." or "Pure:" in its `//!` lines.
fn is_marked_pure(text: &str) -> bool {
    text.lines()
        .take_while(|line| line.starts_with("//!"))
        .any(|line| line.contains("Pure.") || line.contains("Pure:"))
}

fn pure_files_do_no_io() {
    let mut found = Vec::new();
    let sources = sources();
    let pure = || sources.iter().filter(|(name, text)| !name.contains("test") && is_marked_pure(text));
    for (name, text) in pure() {
        // The remaining lines are tests.
        let code = text.split("#[cfg(test)]").next().unwrap();
        found.extend(lines(name, code, |line| {
            !is_comment(line) && IMPURE.iter().any(|impure| line.contains(impure))
        }));
    }
    assert_none("a file that is marked as pure names", &found);
    for directory in WITH_PURE_FILES {
        let has_one = pure().any(|(name, _)| name.starts_with(directory));
        assert!(has_one, "{directory} has no file that is marked as pure");
    }
}

/// Returns the top-level module of a source of `control`.
fn control_module(name: &str) -> Option<&str> {
    let module = name.strip_prefix("control/src/")?.split('/').next()?.trim_end_matches(".rs");
    (module != "lib" && module != "main").then_some(module)
}

fn modules_import_downwards() {
    let height = |module: &str| CONTROL_MODULES.iter().position(|known| *known == module);
    let mut found = Vec::new();
    for (name, text) in sources() {
        let Some(module) = control_module(&name).filter(|_| !name.contains("test")) else { continue };
        let own =
            height(module).unwrap_or_else(|| panic!("{name}: the module {module} has no place in the order"));
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        found.extend(lines(&name, code, |line| {
            let mut imported = line.split("crate::").skip(1).filter_map(|rest| {
                height(rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next()?)
            });
            !is_comment(line) && imported.any(|imported| imported > own)
        }));
    }
    assert_none("a module imports from one above it", &found);
}

fn files_are_short() {
    let long = sources()
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, count)| *count > LINES_MAX)
        .map(|(name, count)| format!("{name}: {count} lines, more than {LINES_MAX}"))
        .collect::<Vec<_>>();
    assert_none("too long", &long);
}

fn links_have_a_target() {
    let mut found = Vec::new();
    for document in ["README.md", "benches/README.md", "control/README.md", "engine/README.md"] {
        let path = root().join(document);
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split('#').next().unwrap();
            let elsewhere = target.is_empty() || target.contains("://") || target.starts_with("mailto:");
            if !elsewhere && !path.parent().unwrap().join(target).exists() {
                found.push(format!("{document}: {target}"));
            }
        }
    }
    assert_none("a link leads nowhere", &found);
}
