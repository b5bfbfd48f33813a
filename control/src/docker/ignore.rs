//! `.dockerignore`: the files of a folder that are excluded from its build. Pure.
//!
//! The rules are those of the Docker documentation. Each line is a pattern, trimmed; a line that starts with `#` is a
//! comment. A pattern is cleaned as a path, and a leading `/` is ignored. It matches a path, and all paths below it. The
//! last line that matches decides, and a leading `!` makes it an exception. In a pattern, `*` and `?` do not match `/`,
//! `[…]` is a set (`^` negates it), `\` escapes the next character, and `**` matches any number of directories, or any rest
//! at the end.

/// The lines of a `.dockerignore`.
#[derive(Debug, Default)]
pub(super) struct Ignored(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    exception: bool,
    glob: Vec<Piece>,
}

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    /// A literal character.
    Char(char),
    /// `?`
    AnyChar,
    /// `*`
    AnyChars,
    /// `**/`
    Directories,
    /// `**` at the end.
    Anything,
    /// `[…]`
    Set { negated: bool, ranges: Vec<(char, char)> },
}

impl Ignored {
    /// Parses the text of a `.dockerignore`.
    ///
    /// # Errors
    /// The invalid line and the reason.
    pub(super) fn parse(text: &str) -> Result<Ignored, String> {
        let text = text.trim_start_matches('\u{feff}');
        let mut rules = Vec::new();
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.starts_with('#')) {
            let line = line.trim();
            let (exception, pattern) = match line.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, line),
            };
            let wrong = |why: &str| format!(".dockerignore line {number}: {why}");
            if pattern.is_empty() {
                if exception {
                    return Err(wrong("an exception without a pattern"));
                }
                continue;
            }
            rules.push(Rule { exception, glob: glob(&clean(pattern)).map_err(wrong)? });
        }
        Ok(Ignored(rules))
    }

    /// Returns whether a path, relative to the folder and without a leading `/`, is excluded.
    pub(super) fn ignores(&self, path: &str) -> bool {
        let mut ignored = false;
        for rule in &self.0 {
            // Skip a line that could not change the result.
            if rule.exception == ignored && ancestors(path).any(|ancestor| matches(&rule.glob, ancestor)) {
                ignored = !rule.exception;
            }
        }
        ignored
    }

    /// Returns whether paths below an excluded directory may be included.
    pub(super) fn has_exceptions(&self) -> bool {
        self.0.iter().any(|rule| rule.exception)
    }
}

/// Returns a path and its ancestors: for `a/b/c` the paths `a`, `a/b` and `a/b/c`.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| at).chain([path.len()]).filter_map(|end| path.get(..end))
}

/// Normalises a path: removes empty components, `.` and resolvable `..`. A path above the folder matches no path in it.
fn clean(pattern: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in pattern.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." && parts.last().is_some_and(|last| *last != "..") {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    parts.join("/")
}

fn glob(pattern: &str) -> Result<Vec<Piece>, &'static str> {
    let mut pieces = Vec::new();
    let mut rest = pattern.chars().peekable();
    while let Some(c) = rest.next() {
        pieces.push(match c {
            '?' => Piece::AnyChar,
            '*' if rest.next_if_eq(&'*').is_some() => {
                rest.next_if_eq(&'/');
                if rest.peek().is_none() { Piece::Anything } else { Piece::Directories }
            }
            '*' => Piece::AnyChars,
            '\\' => Piece::Char(rest.next().ok_or("nothing follows the \\")?),
            '[' => set(&mut rest)?,
            _ => Piece::Char(c),
        });
    }
    Ok(pieces)
}

fn set(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<Piece, &'static str> {
    const OPEN: &str = "a [ without its ]";
    let negated = rest.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    loop {
        let member = |c: Option<char>, rest: &mut std::iter::Peekable<std::str::Chars<'_>>| match c {
            Some('\\') => rest.next().ok_or(OPEN),
            Some(c) => Ok(c),
            None => Err(OPEN),
        };
        let first = match rest.next() {
            Some(']') if !ranges.is_empty() => return Ok(Piece::Set { negated, ranges }),
            c => member(c, rest)?,
        };
        let last = if rest.next_if_eq(&'-').is_some() {
            let c = rest.next();
            member(c, rest)?
        } else {
            first
        };
        if last < first {
            return Err("a range that runs backwards");
        }
        ranges.push((first, last));
    }
}

/// Returns whether the whole path matches. Processes the path once with the set of reachable positions in the pattern, so
/// the time is at most the product of both lengths. A position is before a piece; `within` marks a started `**/`.
fn matches(glob: &[Piece], path: &str) -> bool {
    let mut positions = vec![false; glob.len() + 1];
    let mut within = vec![false; glob.len()];
    positions[0] = true;
    skip_empty(glob, &mut positions);
    for c in path.chars() {
        let mut next = vec![false; glob.len() + 1];
        for (at, piece) in glob.iter().enumerate() {
            if *piece == Piece::Directories {
                within[at] |= positions[at];
                next[at + 1] |= within[at] && c == '/';
            } else if positions[at] {
                match piece {
                    Piece::Char(wanted) => next[at + 1] |= c == *wanted,
                    Piece::AnyChar => next[at + 1] |= c != '/',
                    Piece::AnyChars => next[at] |= c != '/',
                    Piece::Anything | Piece::Directories => next[at] = true,
                    Piece::Set { negated, ranges } => {
                        let inside = ranges.iter().any(|(first, last)| (*first..=*last).contains(&c));
                        next[at + 1] |= inside != *negated && c != '/';
                    }
                }
            }
        }
        skip_empty(glob, &mut next);
        positions = next;
    }
    positions[glob.len()]
}

/// Skips pieces that match the empty text.
fn skip_empty(glob: &[Piece], positions: &mut [bool]) {
    for (at, piece) in glob.iter().enumerate() {
        let matches_empty = matches!(piece, Piece::AnyChars | Piece::Anything | Piece::Directories);
        positions[at + 1] |= positions[at] && matches_empty;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ignores(text: &str, path: &str) -> bool {
        Ignored::parse(text).unwrap().ignores(path)
    }

    #[test]
    fn the_documented_examples_match() {
        for (pattern, path, expected) in [
            ("*/temp*", "somedir/temporary.txt", true),
            ("*/temp*", "somedir/temp", true),
            ("*/temp*", "temp", false),
            ("*/*/temp*", "somedir/subdir/temporary.txt", true),
            ("*/*/temp*", "somedir/temporary.txt", false),
            ("temp?", "tempa", true),
            ("temp?", "temp", false),
            ("**/*.go", "a/b/c.go", true),
            ("**/*.go", "c.go", true),
            ("**", "a/b", true),
            ("a/**", "a/b/c", true),
            ("a/**/c", "a/c", true),
            ("a/**/c", "a/x/y/c", true),
            ("a/**/c", "ac", false),
            ("/foo/", "foo/x", true),
            ("./foo", "foo", true),
            ("foo", "bar/foo", false),
            ("foo", "foobar", false),
            ("*.md", "a/README.md", false),
            ("[a-c].txt", "b.txt", true),
            ("[^a-c].txt", "b.txt", false),
            ("\\*.txt", "*.txt", true),
            ("\\*.txt", "a.txt", false),
            ("# not a pattern", "# not a pattern", false),
            ("a.b", "axb", false),
            ("x/../y", "y", true),
            ("../y", "y", false),
        ] {
            assert_eq!(ignores(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn the_last_line_that_matches_decides() {
        let text = "*.md\n!README*.md\nREADME-secret.md\n";
        assert!(ignores(text, "a.md") && !ignores(text, "README-x.md") && ignores(text, "README-secret.md"));
        let text = "*.md\nREADME-secret.md\n!README*.md\n";
        assert!(!ignores(text, "README-secret.md"));
        assert!(!ignores("node_modules\n!node_modules/keep", "node_modules/keep/a.js"));
    }

    #[test]
    fn an_invalid_line_is_reported() {
        assert_eq!(
            Ignored::parse("a\n!\n").unwrap_err(),
            ".dockerignore line 2: an exception without a pattern"
        );
        assert_eq!(Ignored::parse("[a").unwrap_err(), ".dockerignore line 1: a [ without its ]");
        assert!(Ignored::parse("[b-a]").is_err() && Ignored::parse("a\\").is_err());
    }

    proptest! {
        #[test]
        fn a_path_without_special_characters_matches_itself_and_its_descendants(
            path in "[a-z.]{1,4}[a-z](/[a-z]{1,3}){0,3}", below in "[a-z]{1,3}",
        ) {
            prop_assert!(ignores(&path, &path));
            let deeper = format!("{path}/{below}");
            prop_assert!(ignores(&path, &deeper));
            let longer = format!("{path}x");
            prop_assert!(!ignores(&path, &longer));
        }

        #[test]
        fn arbitrary_text_does_not_panic(text in any::<String>(), path in any::<String>()) {
            if let Ok(ignored) = Ignored::parse(&text) {
                ignored.ignores(&path);
            }
        }
    }
}
